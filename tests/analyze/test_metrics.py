"""Figures over layers, shares of latents and intervals in the tables, each computed by itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlsae.analyze import Analysis, AnalyzeConfig, run
from mlsae.analyze.measure.bootstrap import estimate
from mlsae.analyze.results.metric_columns import LAYER_METRICS
from mlsae.sae import load as load_sae

Float = npt.NDArray[np.float64]
LAYERS = (0, 1, 3)
LENGTH = 24
NUM_SEQUENCES = 37
SKIP = 1


@pytest.fixture(scope="module")
def analysis(
    world: Any, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Analysis:
    directory = sae_maker(world.store, skip_positions=SKIP, num_latents=160)
    out = tmp_path_factory.mktemp("metrics") / "out"
    config = AnalyzeConfig(
        figures=False, cache=world.store, sae=directory, out=out, rows="all", batch_size=50
    )
    return run(config)


@pytest.fixture(scope="module")
def by_layer(
    world: Any, sae_maker: Callable[..., Path], dense: Any
) -> dict[int, tuple[Float, Float, Float]]:
    """x, x̂ and z of the eligible rows, in float64."""
    sae = dense(load_sae(sae_maker(world.store, skip_positions=SKIP, num_latents=160)))
    chosen = _eligible(world)
    x = {n: world.activations[n].astype(np.float64)[chosen] for n in LAYERS}
    return {n: (x[n], sae.reconstruction(x[n]), sae.latents(x[n])) for n in LAYERS}


def _eligible(world: Any) -> npt.NDArray[np.bool_]:
    position = np.arange(NUM_SEQUENCES * LENGTH) % LENGTH
    return np.asarray((world.flags == 0) & (position >= SKIP))


def test_figures_of_rows_and_latents_by_layer(
    analysis: Analysis, by_layer: dict[int, tuple[Float, Float, Float]]
) -> None:
    for row in analysis.layers.to_pylist():
        x, x_hat, z = by_layer[row["layer"]]
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(x_hat, axis=1)
        dots = (x * x_hat).sum(axis=1)
        assert row["cosine"] == pytest.approx((dots / norms).mean(), rel=1e-5)
        bias = (x_hat**2).sum() / dots.sum()
        assert row["relative_reconstruction_bias"] == pytest.approx(bias, rel=1e-5)
        assert row["explained_variance"] == pytest.approx(1 - row["fvu"], abs=1e-12)
        active = z > 0
        assert row["density"] == pytest.approx(active.mean(), rel=1e-12)
        assert row["dead_fraction"] == (~active.any(axis=0)).mean() > 0
        assert row["frequent_fraction"] == (active.mean(axis=0) > 0.1).mean() > 0
        assert row["always_on_fraction"] == active.all(axis=0).mean()


def test_all_rows_together_are_summed_over_layers(
    analysis: Analysis, by_layer: dict[int, tuple[Float, Float, Float]]
) -> None:
    together = analysis.overall.to_pylist()[1]
    assert together["over"] == "all"
    x, x_hat, z = (np.stack(part) for part in zip(*by_layer.values(), strict=True))
    error = ((x - x_hat) ** 2).sum()
    of_channels = ((x - x.mean(axis=1, keepdims=True)) ** 2).sum()
    of_layers = ((x - x.mean(axis=(1, 2), keepdims=True)) ** 2).sum()
    assert together["num_rows"] == 3 * x.shape[1]
    assert together["fvu"] == pytest.approx(error / of_channels, rel=1e-5)
    assert together["fvu_published"] == pytest.approx(error / of_layers, rel=1e-5)
    assert together["mse"] == pytest.approx(error / x.size, rel=1e-5)
    active = (z > 0).reshape(-1, 160)
    assert together["l0"] == pytest.approx(active.sum(axis=1).mean(), rel=1e-12)
    assert together["dead_fraction"] == (~active.any(axis=0)).mean() > 0
    assert together["frequent_fraction"] == (active.mean(axis=0) > 0.1).mean()


def test_the_mean_is_over_layers(analysis: Analysis) -> None:
    mean, layers = analysis.overall.to_pylist()[0], analysis.layers.to_pylist()
    assert mean["over"] == "mean"
    assert mean["num_rows"] is None
    for name in ("fvu", "cosine", "l1", "dead_fraction", "delta_ce", "ce_store", "kl", "ce_mean"):
        assert mean[name] == pytest.approx(np.mean([row[name] for row in layers]), rel=1e-12)


def test_intervals_of_fvu_are_those_of_resampled_rows(
    analysis: Analysis, world: Any, by_layer: dict[int, tuple[Float, Float, Float]]
) -> None:
    """The mean that rows are measured from is that of the rows that are there."""
    sequence = (np.arange(NUM_SEQUENCES * LENGTH) // LENGTH)[_eligible(world)]
    for row in analysis.layers.to_pylist():
        x, x_hat, _ = by_layer[row["layer"]]
        found = [row["fvu"]]
        for left_out in range(NUM_SEQUENCES):
            a, b = (part[sequence != left_out] for part in (x, x_hat))
            found.append(((a - b) ** 2).sum() / ((a - a.mean(axis=0)) ** 2).sum())
        interval = estimate(np.array(found))
        assert row["fvu_low"] == pytest.approx(interval.low, rel=1e-5)
        assert row["fvu_high"] == pytest.approx(interval.high, rel=1e-5)


def test_every_figure_that_is_a_ratio_of_sums_lies_in_its_interval(analysis: Analysis) -> None:
    names = [c.name.removesuffix("_low") for c in LAYER_METRICS if c.name.endswith("_low")]
    assert len(names) == 28
    for row in analysis.layers.to_pylist() + analysis.overall.to_pylist():
        for name in names:
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            if low is not None:
                assert low <= row[name] <= high, name
        for name in ("fvu", "cosine", "delta_ce", "kl", "top1_agreement"):
            assert row[f"{name}_low"] < row[f"{name}_high"]


def test_one_sequence_has_figures_and_no_interval(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    config = AnalyzeConfig(
        figures=False,
        cache=world.store,
        sae=sae_maker(world.store),
        out=tmp_path / "out",
        rows="all",
        max_tokens=LENGTH,
    )
    for row in run(config).layers.to_pylist():
        assert row["fvu"] > 0
        assert row["ce"] > 0
        assert {row[c.name] for c in LAYER_METRICS if c.name.endswith(("_low", "_high"))} == {None}
