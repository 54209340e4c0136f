"""The cross-entropy family against a run of the model through plain torch hooks, in float64."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from mlsae.analyze import AnalyzeConfig, run
from mlsae.analyze.measure.bootstrap import estimate, ratio
from mlsae.analyze.measure.model.cross_entropy import (
    CrossEntropy,
    divergences,
    measure,
    put_where,
    reconstruct_where,
)
from mlsae.analyze.measure.model.sequences import counted_targets
from mlsae.analyze.pairing import Pairing, pair
from mlsae.models import load
from mlsae.sae import load as load_sae
from mlsae.store import MASKED, PADDING, SPECIAL

LAYERS = (0, 1, 3)
LENGTH = 24
CPU = torch.device("cpu")


@dataclass
class Sums:
    """Sums of the independent run."""

    num_tokens: int = 0
    ce: float = 0.0
    ce_store: float = 0.0
    ce_sae: float = 0.0
    ce_zero: float = 0.0
    ce_zero_eligible: float = 0.0
    ce_mean: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    from_spliced: "Sums | None" = None
    """Sums of the targets that are predicted from a spliced token alone."""


Change = Callable[[int, torch.Tensor], torch.Tensor]


def _log_probs(
    model: Any, layers: tuple[int, ...], tokens: torch.Tensor, change: Change, swap: list[int]
) -> Any:
    """Float64 log-probabilities (T, V) with `change` of the layers' outputs at positions `swap`."""

    def hook_of(layer: int) -> Callable[..., Any]:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            x = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            x[0, swap] = change(layer, x[0])[swap].float()
            return x if isinstance(output, torch.Tensor) else (x, *output[1:])

        return hook

    handles = [model.gpt_neox.layers[n].register_forward_hook(hook_of(n)) for n in layers]
    with torch.no_grad():
        logits = model(tokens).logits[0].double()
    for handle in handles:
        handle.remove()
    return logits.log_softmax(-1).numpy()


def _by_plain_hooks(
    world: Any, sae: Any, layers: tuple[int, ...], sequences: list[int], skip: int
) -> Sums:
    """One sequence and one token at a time, without anything of this package but the weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(world.model).eval()
    every, from_spliced = Sums(), Sums()
    position = np.arange(len(world.tokens)) % LENGTH
    eligible = (world.flags == 0) & (position >= skip)
    means = {n: torch.from_numpy(world.activations[n][eligible].mean(axis=0)) for n in layers}
    for sequence in sequences:
        span = slice(sequence * LENGTH, (sequence + 1) * LENGTH)
        tokens = torch.from_numpy(world.tokens[span])[None]
        flags, documents = world.flags[span], world.documents[span]
        swap = [t for t in range(LENGTH) if flags[t] == 0 and t >= skip]
        stored = {n: torch.from_numpy(world.activations[n][span]) for n in layers}
        changes: dict[str, Change] = {
            "store": lambda n, _x, stored=stored: stored[n],
            "sae": lambda _n, x: torch.from_numpy(sae.reconstruction(x.double().numpy())),
            "zero": lambda _n, x: torch.zeros_like(x),
            "mean": lambda n, x: means[n].expand_as(x),
        }
        true = _log_probs(model, (), tokens, lambda _n, x: x, [])
        of = {
            name: _log_probs(model, layers, tokens, change, swap)
            for name, change in changes.items()
        }
        everywhere = list(range(LENGTH))
        zeroed = _log_probs(model, layers, tokens, changes["zero"], everywhere)
        for t in range(LENGTH - 1):
            if documents[t] != documents[t + 1] or flags[t + 1] or flags[t] & PADDING:
                continue
            target = tokens[0, t + 1]
            for sums in (every, from_spliced) if t in swap else (every,):
                sums.num_tokens += 1
                sums.ce -= true[t, target]
                sums.ce_store -= of["store"][t, target]
                sums.ce_sae -= of["sae"][t, target]
                sums.ce_zero -= zeroed[t, target]
                sums.ce_zero_eligible -= of["zero"][t, target]
                sums.ce_mean -= of["mean"][t, target]
                sums.kl += (np.exp(true[t]) * (true[t] - of["sae"][t])).sum()
                sums.agreed += int(true[t].argmax() == of["sae"][t].argmax())
    every.from_spliced = from_spliced
    return every


def _agree(row: dict[str, Any], sums: Sums) -> None:
    n = sums.num_tokens
    assert row["num_ce_tokens"] == n
    assert row["ce"] == pytest.approx(sums.ce / n, rel=1e-5)
    assert row["ce_sae"] == pytest.approx(sums.ce_sae / n, rel=1e-5)
    assert row["delta_ce"] == pytest.approx((sums.ce_sae - sums.ce) / n, abs=2e-5)
    assert row["ce_zero"] == pytest.approx(sums.ce_zero / n, rel=1e-5)
    assert row["ce_zero_eligible"] == pytest.approx(sums.ce_zero_eligible / n, rel=1e-5)
    assert row["ce_zero"] != pytest.approx(row["ce_zero_eligible"], rel=1e-3)
    assert row["ce_mean"] == pytest.approx(sums.ce_mean / n, rel=1e-5)
    assert row["kl"] == pytest.approx(sums.kl / n, rel=1e-4)
    assert row["kl"] > 0.01
    assert row["top1_agreement"] == sums.agreed / n
    assert 0 < row["top1_agreement"] < 1
    some = sums.from_spliced
    assert some is not None
    assert 0 < some.num_tokens < n
    assert row["num_ce_tokens_spliced"] == some.num_tokens
    added = (some.ce_sae - some.ce) / some.num_tokens
    assert row["delta_ce_spliced"] == pytest.approx(added, abs=2e-5)
    assert row["delta_ce_spliced"] != pytest.approx(row["delta_ce"], abs=1e-3)
    assert row["kl_spliced"] == pytest.approx(some.kl / some.num_tokens, rel=1e-4)
    assert row["top1_agreement_spliced"] == some.agreed / some.num_tokens
    for name, ablated in (
        ("zero", sums.ce_zero),
        ("zero_eligible", sums.ce_zero_eligible),
        ("mean", sums.ce_mean),
    ):
        found = row[f"loss_recovered_{name}"]
        if ablated <= sums.ce:
            assert found is None
        else:
            expected = (ablated - sums.ce_sae) / (ablated - sums.ce)
            assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("skip", [0, 2])
def test_the_columns_are_those_of_an_independent_run(
    world: Any, sae_maker: Callable[..., Path], dense: Any, tmp_path: Path, skip: int
) -> None:
    directory = sae_maker(world.store, skip_positions=skip)
    config = AnalyzeConfig(
        figures=False,
        cache=world.store,
        sae=directory,
        out=tmp_path / "out",
        rows="all",
        ce_max_tokens=10 * LENGTH,
    )
    found = run(config)
    sae = dense(load_sae(directory))
    for row in found.layers.to_pylist():
        sums = _by_plain_hooks(world, sae, (row["layer"],), list(range(10)), skip)
        _agree(row, sums)
        assert row["ce_store"] == pytest.approx(sums.ce_store / sums.num_tokens, rel=1e-5)
        assert row["ce_store"] != row["ce"]
    together = found.overall.to_pylist()[1]
    _agree(together, _by_plain_hooks(world, sae, LAYERS, list(range(10)), skip))
    assert together["ce_store"] is None


class Unchanged(torch.nn.Module):
    """Reconstructs every row exactly."""

    def forward(self, x: torch.Tensor, _layer: int) -> torch.Tensor:
        return x


def _pairing(world: Any, directory: Path, reconstruct: torch.nn.Module) -> Pairing:
    return replace(pair(world.store, directory, CPU), sae=reconstruct)


def test_splicing_the_exact_activation_costs_exactly_nothing(
    world: Any, sae_maker: Callable[..., Path]
) -> None:
    pairing = _pairing(world, sae_maker(world.store, skip_positions=0), Unchanged())
    transformer = load(world.model)
    found = measure(
        transformer, pairing, np.arange(12), batch_rows=5 * LENGTH, progress=lambda _n: None
    )
    assert found is not None
    assert found.delta_ce.tolist() == found.kl.tolist() == [0.0] * 3
    assert len(found.ratios()) == 4
    for of in found.ratios():
        num_tokens = of["kl"][1]
        for name in ("delta_ce", "kl", "delta_ce_spliced", "kl_spliced"):
            assert (of[name][0] == 0).all()
        assert (of["top1_agreement"][0] == num_tokens).all()
        np.testing.assert_array_equal(*of["top1_agreement_spliced"])
        assert (of["ce_sae"][0] == of["ce"][0]).all()
        for name in (
            "loss_recovered_zero",
            "loss_recovered_zero_eligible",
            "loss_recovered_mean",
        ):
            np.testing.assert_array_equal(*of[name])


def test_an_ablation_that_costs_rounding_alone_recovers_no_share_of_it() -> None:
    """2e-7 of the cross-entropy is an error of float32 logits, and 1 / 2e-7 is no result."""
    generator = np.random.default_rng(0)
    counted, untouched = np.full(20, 50.0), generator.uniform(90, 110, 20)
    flat = np.zeros((2, 20))
    found = CrossEntropy(
        counted=counted,
        untouched=untouched,
        stored=None,
        added=flat + 5,
        divergence=flat,
        agreed=flat,
        counted_spliced=np.zeros(20),
        added_spliced=flat,
        divergence_spliced=flat,
        agreed_spliced=flat,
        zero=untouched * (1 + 2e-7) + flat,
        zero_eligible=untouched * (1 + 1e-3) + flat,
        mean=untouched + flat,
    )
    for ratios in found.ratios():
        values = {name: estimate(ratio(*of)).value for name, of in ratios.items()}
        assert values["loss_recovered_zero"] is None
        assert values["loss_recovered_mean"] is None
        lost = 1e-3 * untouched.sum()
        assert values["loss_recovered_zero_eligible"] == pytest.approx((lost - 100) / lost)
        for name in ("delta_ce_spliced", "kl_spliced", "top1_agreement_spliced"):
            assert values[name] is None


def test_batches_change_no_figure(world: Any, sae_maker: Callable[..., Path]) -> None:
    pairing = pair(world.store, sae_maker(world.store), CPU)
    transformer = load(world.model)
    seen: list[int] = []
    one, many = (
        measure(transformer, pairing, np.arange(7), batch_rows=rows, progress=seen.append)
        for rows in (1, 5 * LENGTH)
    )
    assert one is not None
    assert many is not None
    assert seen == [LENGTH] * 7 + [5 * LENGTH, 2 * LENGTH]
    assert one.num_tokens == many.num_tokens
    for name in (field.name for field in fields(CrossEntropy)):
        a, b = getattr(one, name), getattr(many, name)
        assert a.shape[-1] == 7
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_only_next_tokens_of_the_same_document_without_a_flag_are_counted() -> None:
    documents: npt.NDArray[np.uint32] = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1]], dtype=np.uint32)
    flags = np.array([[0, 0, SPECIAL, 0, 0, MASKED, 0, PADDING, 0]], dtype=np.uint8)
    #   inputs:       0  1  2        3  4  5       6  7
    expected = [True, False, False, True, False, True, False, False]
    assert counted_targets(documents, flags).tolist() == [expected]


def test_a_separator_may_be_the_input_that_its_document_is_predicted_from() -> None:
    documents = np.array([[0, 1, 1]], dtype=np.uint32)
    flags = np.array([[0, SPECIAL, 0]], dtype=np.uint8)
    assert counted_targets(documents, flags).tolist() == [[False, True]]


def test_only_eligible_rows_are_replaced() -> None:
    x, stored = torch.arange(24.0).view(2, 3, 4), torch.full((2, 3, 4), -1.0)
    eligible = torch.tensor([[False, True, False], [False, False, True]])
    doubled = reconstruct_where(lambda rows, _layer: 2 * rows, eligible, 1)(x)  # type: ignore[arg-type]
    of_store = put_where(stored, eligible)(x)
    of_mean = put_where(torch.arange(4.0) - 9, eligible)(x)
    assert torch.equal(doubled, torch.where(eligible[..., None], 2 * x, x))
    assert torch.equal(of_store, torch.where(eligible[..., None], stored, x))
    assert of_mean[0, 1].tolist() == of_mean[1, 2].tolist() == [-9, -8, -7, -6]
    assert torch.equal(of_mean[~eligible], x[~eligible])
    assert torch.equal(x, torch.arange(24.0).view(2, 3, 4))


def test_kl_is_of_the_untouched_from_the_spliced() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 30, generator=generator).log_softmax(-1) for _ in range(2))
    expected = [
        sum(
            float(a.double().exp() * (a.double() - b.double()))
            for a, b in zip(row_p, row_q, strict=True)
        )
        for row_p, row_q in zip(p, q, strict=True)
    ]
    assert divergences(p, q).tolist() == pytest.approx(expected, rel=1e-5)
    assert divergences(p, q).tolist() != pytest.approx(divergences(q, p).tolist(), rel=1e-2)
    assert divergences(p, p).tolist() == [0.0] * 5


def test_rows_without_two_tokens_of_a_document_have_no_cross_entropy(
    world: Any, sae_maker: Callable[..., Path]
) -> None:
    pairing = pair(world.store, sae_maker(world.store), CPU)
    nothing = measure(
        load(world.model), pairing, np.arange(0), batch_rows=64, progress=lambda _n: None
    )
    assert nothing is None
