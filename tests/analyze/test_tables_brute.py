"""Every number of the tables against its definition, computed by itself in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.analyze import Analysis, AnalyzeConfig, run
from mlsae.analyze.events.plan import plan_events
from mlsae.analyze.measure.rows.joint import Joint
from mlsae.analyze.measure.rows.walk import walk
from mlsae.analyze.pairing import pair
from mlsae.sae import load as load_sae
from mlsae.store import open_store
from mlsae.store.read.split import validation_sequences

Float = npt.NDArray[np.float64]
LAYERS = (0, 1, 3)
LENGTH = 24
NUM_SEQUENCES = 37


@dataclass(frozen=True)
class Case:
    """An analysis, and what brute force needs: everything by layer, over the rows evaluated."""

    analysis: Analysis
    world: Any
    sae: Any
    skip: int
    rows: npt.NDArray[np.int64]
    """Unflagged rows of the evaluated sequences."""
    x: dict[int, Float]
    x_hat: dict[int, Float]
    z: dict[int, Float]

    @property
    def eligible(self) -> npt.NDArray[np.bool_]:
        return self.rows % LENGTH >= self.skip


@pytest.fixture(scope="module", params=[0, 1, 3])
def case(
    request: pytest.FixtureRequest,
    world: Any,
    sae_maker: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    """An analysis of the validation rows for one choice of skipped positions."""
    directory = sae_maker(world.store, skip_positions=request.param, num_latents=160)
    out = tmp_path_factory.mktemp("brute") / "out"
    analysis = run(
        AnalyzeConfig(figures=False, cache=world.store, sae=directory, out=out, batch_size=50)
    )
    store, sae = open_store(world.store), load_sae(directory)
    held_out = validation_sequences(store.plan.tokens_sha256, NUM_SEQUENCES, 0.2, 3)
    every = np.arange(NUM_SEQUENCES * LENGTH)
    rows = every[np.isin(every // LENGTH, held_out) & (world.flags == 0)]
    dense = request.getfixturevalue("dense")(sae)
    x = {n: world.activations[n].astype(np.float64)[rows] for n in LAYERS}
    return Case(
        analysis=analysis,
        world=world,
        sae=sae,
        skip=request.param,
        rows=rows,
        x=x,
        x_hat={n: dense.reconstruction(x[n]) for n in LAYERS},
        z={n: dense.latents(x[n]) for n in LAYERS},
    )


def _fvu(x: Float, x_hat: Float) -> tuple[float, float]:
    error = ((x - x_hat) ** 2).sum()
    by_channel = ((x - x.mean(axis=0)) ** 2).sum()
    return float(error / by_channel), float(error / ((x - x.mean()) ** 2).sum())


def test_layers(case: Case) -> None:
    found = case.analysis.layers.to_pylist()
    assert [row["layer"] for row in found] == list(LAYERS)
    everywhere, later = np.ones(len(case.rows), bool), case.rows % LENGTH > 0
    for row in found:
        x, x_hat, z = (part[row["layer"]] for part in (case.x, case.x_hat, case.z))
        for suffix, mask in (
            ("", case.eligible),
            ("_position_0_in", everywhere),
            ("_position_0_out", later),
        ):
            fvu, published = _fvu(x[mask], x_hat[mask])
            assert row[f"num_rows{suffix}"] == mask.sum()
            assert row[f"fvu{suffix}"] == pytest.approx(fvu, rel=1e-5)
            assert row[f"fvu_published{suffix}"] == pytest.approx(published, rel=1e-5)
        eligible = case.eligible
        assert row["mse"] == pytest.approx(((x - x_hat)[eligible] ** 2).mean(), rel=1e-5)
        assert row["l0"] == pytest.approx((z[eligible] > 0).sum(axis=1).mean(), rel=1e-12)
        assert row["l1"] == pytest.approx(z[eligible].sum(axis=1).mean(), rel=1e-5)


def test_norm_and_cosine_are_those_of_every_eligible_row_of_the_store(case: Case) -> None:
    row = np.arange(NUM_SEQUENCES * LENGTH)
    eligible = (case.world.flags == 0) & (row % LENGTH >= case.skip)
    x = [case.world.activations[n].astype(np.float64)[eligible] for n in LAYERS]
    norms = case.analysis.layers["norm"].to_pylist()
    assert norms == pytest.approx([np.linalg.norm(a, axis=1).mean() for a in x], rel=1e-7)
    c = [a - a.mean(axis=0) for a in x]
    cosines = [(c[n] * c[n + 1]).sum() for n in (0, 1)]
    cosines = [
        s / np.sqrt((c[n] ** 2).sum() * (c[n + 1] ** 2).sum()) for n, s in enumerate(cosines)
    ]
    found = case.analysis.layers["adjacent_cosine_pooled"].to_pylist()
    assert found[:2] == pytest.approx(cosines, rel=1e-7)
    assert found[2] is None


def test_the_adjacent_cosine_is_a_mean_over_evaluated_rows_about_the_means_of_the_store(
    case: Case,
) -> None:
    row = np.arange(NUM_SEQUENCES * LENGTH)
    eligible = (case.world.flags == 0) & (row % LENGTH >= case.skip)
    expected: list[float] = []
    for one, other in ((0, 1), (1, 3)):
        a, b = (
            case.x[n][case.eligible] - case.world.activations[n].astype(float)[eligible].mean(0)
            for n in (one, other)
        )
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        expected.append(float(((a * b).sum(axis=1) / norms).mean()))
    found = case.analysis.layers["adjacent_cosine"].to_pylist()
    assert found[:2] == pytest.approx(expected, rel=1e-7)
    assert found[2] is None
    assert found[:2] != pytest.approx(
        case.analysis.layers["adjacent_cosine_pooled"].to_pylist()[:2], rel=1e-3
    )


def test_a_layer_whose_next_one_the_sae_does_not_read_has_no_adjacent_cosine(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """Layer 3 follows layer 0 in this SAE, and is not next to it."""
    found = {}
    for layers in ((0, 3), (0, 1)):
        pairing = pair(
            world.store, sae_maker(world.store, layers=list(layers)), torch.device("cpu")
        )
        sums, _ = walk(
            pairing,
            np.arange(3),
            batch_rows=50,
            events=plan_events(pairing, np.arange(0), 100, {}),
            directory=tmp_path,
            joint=Joint(pairing, 0),
            examples=None,
            progress=lambda _: None,
        )
        found[layers] = [of.adjacent_cosine is None for of in sums.values()]
    assert found == {(0, 3): [True, True], (0, 1): [False, True]}


def test_latents_and_latent_layers(case: Case) -> None:
    z = np.stack([case.z[n][case.eligible] for n in LAYERS])
    counts, totals = (z > 0).sum(axis=1), z.sum(axis=1)
    latents, by_layer = case.analysis.latents.to_pylist(), case.analysis.latent_layers.to_pylist()
    assert len(latents) == 160
    assert len(by_layer) == 160 * 3
    assert any(row["dead"] for row in latents)
    assert any(row["count"] == 0 and row["prob"] is not None for row in by_layer)
    for j, row in enumerate(latents):
        total, count = totals[:, j].sum(), counts[:, j].sum()
        assert (row["latent"], row["count"], row["dead"]) == (j, count, count == 0)
        assert row["total"] == pytest.approx(total, rel=1e-5)
        assert row["density"] == pytest.approx(count / (3 * case.eligible.sum()), rel=1e-12)
        if count == 0:
            names = ("layer_mean", "layer_var", "layer_std", "layer_entropy")
            assert all(row[name] is row[f"{name}_by_count"] is None for name in names)
            assert row["mean"] is None
            assert row["num_layers"] == 0
            continue
        assert row["mean"] == pytest.approx(total / count, rel=1e-5)
        assert row["num_layers"] == (counts[:, j] > 0).sum()
        for p, suffix in ((totals[:, j] / total, ""), (counts[:, j] / count, "_by_count")):
            mean = sum(p[i] * n for i, n in enumerate(LAYERS))
            var = sum(p[i] * (n - mean) ** 2 for i, n in enumerate(LAYERS))
            entropy = -sum(q * np.log(q) for q in p if q > 0)
            assert row[f"layer_mean{suffix}"] == pytest.approx(mean, rel=1e-5)
            assert row[f"layer_var{suffix}"] == pytest.approx(var, rel=1e-4, abs=1e-12)
            assert row[f"layer_std{suffix}"] == pytest.approx(np.sqrt(var), rel=1e-4, abs=1e-12)
            assert row[f"layer_entropy{suffix}"] == pytest.approx(entropy, rel=1e-4, abs=1e-12)
    for n, row in enumerate(by_layer):
        j, i = divmod(n, 3)
        assert (row["latent"], row["layer"]) == (j, LAYERS[i])
        assert row["count"] == counts[i, j]
        assert row["total"] == pytest.approx(totals[i, j], rel=1e-5)
        mean = totals[i, j] / counts[i, j] if counts[i, j] else None
        prob = totals[i, j] / totals[:, j].sum() if totals[:, j].sum() else None
        assert row["mean"] == (mean if mean is None else pytest.approx(mean, rel=1e-5))
        assert row["prob"] == (prob if prob is None else pytest.approx(prob, rel=1e-5))
        share = counts[i, j] / counts[:, j].sum() if counts[:, j].sum() else None
        assert row["prob_by_count"] == (share if share is None else pytest.approx(share))


def test_activations_are_every_latent_read_back(case: Case) -> None:
    found = case.analysis.events.to_table()
    dense = {n: np.zeros((len(case.rows), 160)) for n in LAYERS}
    place = {int(row): n for n, row in enumerate(case.rows)}
    for event in found.to_pylist():
        z = dense[event["layer"]]
        at = place[event["row"]], event["latent"]
        assert z[at] == 0
        z[at] = event["value"]
    for n in LAYERS:
        expected = case.z[n] * case.eligible[:, None]
        np.testing.assert_allclose(dense[n], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(dense[n] > 0, expected > 0)
    assert case.analysis.summary["num_events"] == len(found)


def test_overall_numbers_are_those_of_the_tables(case: Case) -> None:
    total, layers = case.analysis.summary["overall"], case.analysis.layers.to_pylist()
    assert total["mean_fvu"] == pytest.approx(np.mean([row["fvu"] for row in layers]))
    assert total["mean_fvu_published"] == pytest.approx(
        np.mean([row["fvu_published"] for row in layers])
    )
    assert total["mean_delta_ce"] == pytest.approx(np.mean([row["delta_ce"] for row in layers]))
    latents = case.analysis.latents.to_pylist()
    stds = [row["layer_std"] for row in latents if not row["dead"]]
    assert total["mean_layer_std"] == pytest.approx(np.mean(stds))
    assert total["num_dead"] == 160 - len(stds)
    assert total["dead_fraction"] == total["num_dead"] / total["num_latents"]
    assert case.analysis.summary["num_rows"] == 3 * case.eligible.sum()
