"""The cross-entropy family against a run of the model through plain torch hooks, in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from mlsae.analyze import AnalyzeConfig, run
from mlsae.analyze.cross_entropy import (
    kl_sum,
    measure,
    reconstruct_where,
    stored_where,
)
from mlsae.analyze.pairing import Pairing, pair
from mlsae.analyze.sequences import counted_targets
from mlsae.models import load
from mlsae.sae import load as load_sae
from mlsae.store import MASKED, PADDING, SPECIAL

LAYERS = (0, 1, 3)
LENGTH = 24
CPU = torch.device("cpu")


@dataclass
class Sums:
    """What the independent run adds up."""

    num_tokens: int = 0
    ce: float = 0.0
    ce_store: float = 0.0
    ce_sae: float = 0.0
    kl: float = 0.0


def _log_probs(
    model: Any,
    layer: int,
    tokens: torch.Tensor,
    change: Callable[[torch.Tensor], torch.Tensor],
    swap: list[int],
) -> Any:
    """Float64 log-probabilities (T, V) with `change` of the layer's output at positions `swap`."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        x = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        x[0, swap] = change(x[0])[swap].float()
        return x if isinstance(output, torch.Tensor) else (x, *output[1:])

    handle = model.gpt_neox.layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        logits = model(tokens).logits[0].double()
    handle.remove()
    return logits.log_softmax(-1).numpy()


def _by_plain_hooks(world: Any, sae: Any, layer: int, sequences: list[int], skip: int) -> Sums:
    """One sequence and one token at a time, without anything of this package but the weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(world.model).eval()
    sums = Sums()
    for sequence in sequences:
        span = slice(sequence * LENGTH, (sequence + 1) * LENGTH)
        tokens = torch.from_numpy(world.tokens[span])[None]
        flags, documents = world.flags[span], world.documents[span]
        swap = [t for t in range(LENGTH) if flags[t] == 0 and t >= skip]
        stored = torch.from_numpy(world.activations[layer][span])

        def put_stored(_x: torch.Tensor, stored: torch.Tensor = stored) -> torch.Tensor:
            return stored

        def put_rebuilt(x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(sae.reconstruction(x.double().numpy()))

        true = _log_probs(model, layer, tokens, lambda x: x, [])
        of_store = _log_probs(model, layer, tokens, put_stored, swap)
        of_sae = _log_probs(model, layer, tokens, put_rebuilt, swap)
        for t in range(LENGTH - 1):
            if documents[t] != documents[t + 1] or flags[t + 1] or flags[t] & PADDING:
                continue
            target = tokens[0, t + 1]
            sums.num_tokens += 1
            sums.ce -= true[t, target]
            sums.ce_store -= of_store[t, target]
            sums.ce_sae -= of_sae[t, target]
            sums.kl += (np.exp(true[t]) * (true[t] - of_sae[t])).sum()
    return sums


@pytest.mark.parametrize("skip", [0, 2])
def test_the_columns_are_those_of_an_independent_run(
    world: Any, sae_maker: Callable[..., Path], dense: Any, tmp_path: Path, skip: int
) -> None:
    directory = sae_maker(world.store, skip_positions=skip)
    config = AnalyzeConfig(
        cache=world.store,
        sae=directory,
        out=tmp_path / "out",
        rows="all",
        ce_max_tokens=10 * LENGTH,
    )
    found = run(config).layers.to_pylist()
    sae = dense(load_sae(directory))
    for row in found:
        sums = _by_plain_hooks(world, sae, row["layer"], list(range(10)), skip)
        n = sums.num_tokens
        assert row["num_ce_tokens"] == n
        assert row["ce"] == pytest.approx(sums.ce / n, rel=1e-5)
        assert row["ce_store"] == pytest.approx(sums.ce_store / n, rel=1e-5)
        assert row["ce_sae"] == pytest.approx(sums.ce_sae / n, rel=1e-5)
        assert row["delta_ce"] == pytest.approx((sums.ce_sae - sums.ce) / n, abs=2e-5)
        assert row["kl"] == pytest.approx(sums.kl / n, rel=1e-4)
        assert row["kl"] > 0.01
        assert row["ce_store"] != row["ce"]


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
    assert found.delta_ce.tolist() == [0.0, 0.0, 0.0]
    assert found.kl.tolist() == [0.0, 0.0, 0.0]
    assert found.ce_sae.tolist() == [found.ce] * 3


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
    np.testing.assert_allclose(one.ce_sae, many.ce_sae, rtol=1e-5)
    np.testing.assert_allclose(one.kl, many.kl, rtol=1e-4)


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
    of_store = stored_where(stored, eligible)(x)
    assert torch.equal(doubled, torch.where(eligible[..., None], 2 * x, x))
    assert torch.equal(of_store, torch.where(eligible[..., None], stored, x))
    assert torch.equal(x, torch.arange(24.0).view(2, 3, 4))


def test_kl_is_of_the_untouched_from_the_spliced() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 30, generator=generator).log_softmax(-1) for _ in range(2))
    expected = sum(
        float(a.double().exp() * (a.double() - b.double()))
        for row_p, row_q in zip(p, q, strict=True)
        for a, b in zip(row_p, row_q, strict=True)
    )
    assert kl_sum(p, q) == pytest.approx(expected, rel=1e-6)
    assert kl_sum(p, q) != pytest.approx(kl_sum(q, p), rel=1e-2)
    assert kl_sum(p, p) == 0.0


def test_rows_without_two_tokens_of_a_document_have_no_cross_entropy(
    world: Any, sae_maker: Callable[..., Path]
) -> None:
    pairing = pair(world.store, sae_maker(world.store), CPU)
    nothing = measure(
        load(world.model), pairing, np.arange(0), batch_rows=64, progress=lambda _n: None
    )
    assert nothing is None
