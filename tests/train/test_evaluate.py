"""The validation summary, against one pass in float64 numpy over whole arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.store import create, open_store
from mlsae.store.format.positions import kept_positions
from mlsae.train.running import evaluate as module
from mlsae.train.running.baseline import pca_fvu
from mlsae.train.running.evaluate import evaluate, not_finite
from mlsae.train.running.record import format_summary, is_useless
from mlsae.train.step.objective import layer_variances

SEQUENCES = np.array([0, 3, 4, 20, 36])


def make_sae(d_in: int) -> SAE:
    return SAE(
        SAEConfig(d_in=d_in, num_latents=48, architecture=TopK(4)), torch.Generator().manual_seed(1)
    )


def measure(sae: SAE, store: Any, **options: Any) -> dict[str, Any]:
    given = {"rank": 0, "world_size": 1, "sum_over_ranks": lambda t: t, "skip_positions": 1}
    return evaluate(sae, store, "resid_post", (0, 3), SEQUENCES, **given | options)


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("skip_positions", "kept"), [(0, 24), (1, 24), (3, 24), (1, 7)])
def test_figures_equal_a_plain_computation(
    encoding: str,
    skip_positions: int,
    kept: int,
    sample_maker: Any,
    thinned: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FVU in both spaces, L0, rows and dead latents, with position 0 in and out."""
    monkeypatch.setattr(module, "_BLOCK_ROWS", 50)
    sample = sample_maker(encoding=encoding)
    store = open_store(sample.path if kept == 24 else thinned(sample, num=kept))
    sae = make_sae(store.d_model)
    found = measure(sae, store, skip_positions=skip_positions)
    positions = kept_positions(5, 0, 37, 24, kept)
    token = (positions + 24 * np.arange(37)[:, None]).ravel()
    wanted = np.isin(token // 24, SEQUENCES) & (sample.token_flags[token] == 0)
    for name, first in (("position_0_in", 0), ("position_0_out", max(1, skip_positions))):
        mask, used = wanted & (token % 24 >= first), set()
        for entry, layer in zip(found[name]["layers"], (0, 3), strict=True):
            x = store.read("resid_post", layer)[mask]
            latents = sae.encode(torch.from_numpy(x))
            x_hat = sae.decode(latents).detach().numpy().astype(np.float64)
            x = x.astype(np.float64)
            m, s = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
            u, u_hat = (x - m) / (s + 1e-5), (x_hat - m) / s
            active = latents.values > 0
            used |= set(latents.indices[active].tolist())
            assert entry["layer"] == layer
            assert entry["num_rows"] == mask.sum()
            fvu = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
            np.testing.assert_allclose(entry["fvu"], fvu, rtol=1e-5)
            fvu_u = ((u - u_hat) ** 2).sum() / ((u - u.mean(0)) ** 2).sum()
            np.testing.assert_allclose(entry["fvu_standardized"], fvu_u, rtol=1e-5)
            np.testing.assert_allclose(entry["l0"], active.sum() / mask.sum())
        assert found[name]["num_rows"] == 2 * mask.sum()
        assert found[name]["num_dead"] == 48 - len(used)
        assert found[name]["dead_fraction"] == (48 - len(used)) / 48


def test_ranks_add_up_to_one(sample: Any) -> None:
    """Each takes its sequences; sums are the same, so ratios are."""
    store = open_store(sample.path)
    sae = make_sae(store.d_model)
    partial: list[list[torch.Tensor]] = []
    for rank in range(2):
        partial.append([])

        def keep(tensor: torch.Tensor, rank: int = rank) -> torch.Tensor:
            partial[rank].append(tensor.clone())
            return tensor

        measure(sae, store, rank=rank, world_size=2, sum_over_ranks=keep)
    sums = iter([a + b for a, b in zip(*partial, strict=True)])
    together = measure(sae, store, rank=1, world_size=2, sum_over_ranks=lambda _: next(sums))
    alone = measure(sae, store)
    for name in ("position_0_in", "position_0_out"):
        assert together[name]["num_dead"] == alone[name]["num_dead"]
        for a, b in zip(together[name]["layers"], alone[name]["layers"], strict=True):
            assert a["num_rows"] == b["num_rows"]
            np.testing.assert_allclose(a["fvu"], b["fvu"], rtol=1e-6)


def test_no_rows_give_no_ratio(sample: Any) -> None:
    """None, not NaN and no division by zero."""
    store = open_store(sample.path)
    sae = make_sae(store.d_model)
    found = evaluate(
        sae,
        store,
        "resid_post",
        (1,),
        np.zeros(0, np.int64),
        skip_positions=1,
        rank=0,
        world_size=1,
        sum_over_ranks=lambda t: t,
    )
    names = ("fvu", "fvu_standardized", "l0", "silent_fraction")
    entry = {"layer": 1, "num_rows": 0, **dict.fromkeys(names)}
    assert found["position_0_in"]["layers"] == [entry]
    assert found["position_0_in"]["dead_fraction"] is None
    assert format_summary(found) == (
        "No row of the sequences held out counts: no summary of validation rows."
    )


def test_layers_that_are_not_reconstructed_as_numbers_are_named() -> None:
    """By figures that are not finite, or all of them where a weight is not."""
    sae = make_sae(8)
    layers = [{"layer": 0, "fvu": 0.5}, {"layer": 2, "fvu": None}, {"layer": 3, "fvu": np.inf}]
    metrics = {"position_0_in": {"layers": layers}}
    assert not_finite(sae, None, (0, 2, 3)) == ()
    assert not_finite(sae, metrics, (0, 2, 3)) == (3,)
    with torch.no_grad():
        sae.b[1] = torch.nan
    assert not_finite(sae, None, (0, 2, 3)) == (0, 2, 3)


@pytest.mark.parametrize(
    ("fvu", "expected"),
    [
        ([1.0, 361.8], True),
        ([1.2, 0.48, 361.8], False),
        ([None, 1.1], True),
        ([None, None], False),
        ([], False),
    ],
)
def test_an_sae_is_useless_that_is_so_at_every_layer(
    fvu: list[float | None], expected: bool
) -> None:
    """One layer that fares ill spoils a mean, and not the others."""
    metrics = {"position_0_out": {"layers": [{"fvu": value} for value in fvu]}}
    assert is_useless(metrics) == expected
    assert not is_useless(None)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_rows_that_do_not_vary_have_no_fvu(scale: float, tmp_path: Path) -> None:
    """Equal held-out rows, in a store whose rows vary; and rows that differ in length alone."""
    generator = np.random.default_rng(0)
    x = generator.normal(3, 1, (64, 8)).astype(np.float32)
    x[8:24] = x[8]
    lengths = generator.uniform(1, 3, (64, 1)).astype(np.float32)
    with create(
        tmp_path / "acts",
        tokens=np.arange(64),
        context_length=8,
        layers=(0, 3),
        d_model=8,
        encoding="float32",
        source={"made_by": "test"},
    ) as writer:
        writer.append({("resid_post", 0): scale * x, ("resid_post", 3): 1000 * lengths * x[:1]})
    store = open_store(tmp_path / "acts")
    sae = make_sae(8)
    alone: dict[str, Any] = {"rank": 0, "world_size": 1, "sum_over_ranks": lambda t: t}
    found = evaluate(sae, store, "resid_post", (0, 3), np.array([1, 2]), skip_positions=1, **alone)
    still, lengthened = found["position_0_in"]["layers"]
    assert still["fvu"] is still["fvu_standardized"] is None
    assert lengthened["fvu"] > 0
    assert lengthened["fvu_standardized"] is None
    with pytest.raises(InputError, match=r"layer 3 do not vary \(variance \d"):
        layer_variances(store.moments("resid_post", 1), (0, 3), "standardized")
    assert (layer_variances(store.moments("resid_post", 1), (0, 3), "raw") > 0).all()
    assert pca_fvu(
        store,
        "resid_post",
        (0,),
        np.array([1, 2]),
        skip_positions=1,
        device=torch.device("cpu"),
        **alone,
    )[0].tolist() == pytest.approx([np.nan] * 9, nan_ok=True)


def test_rows_without_a_latent_are_told_in_one_number():
    """The most of any layer, and which."""
    names = ("fvu", "fvu_pca", "fvu_standardized", "l0")
    layers = [
        {"layer": layer, "pca_directions": 4, "silent_fraction": share, **dict.fromkeys(names, 0.5)}
        for layer, share in ((0, 0.0), (1, 0.25), (3, 0.25))
    ]
    metrics = {"layers": layers, "num_rows": 8, "num_dead": 0, "dead_fraction": 0.0}
    told = format_summary({"position_0_out": metrics, "position_0_in": metrics})
    assert told.splitlines()[-1] == "rows without a latent: up to 25.00% of a layer's, at layer 1"
