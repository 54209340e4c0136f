"""Cosines of decoder directions, in blocks, against all of them at once in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.analyze import AnalyzeConfig, run
from mlsae.analyze.measure import directions
from mlsae.analyze.measure.directions import COSINE_BINS, DecoderPairs, decoder_pairs, nearest_rows
from mlsae.analyze.measure.histograms import histograms_table, layer_cosine_table
from mlsae.models import load as load_model
from mlsae.sae import load as load_sae

Float = npt.NDArray[np.float64]


@pytest.fixture
def rows() -> Float:
    """37 directions of 6 channels of many lengths, two of them nearly the same."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(37, 6)) * generator.exponential(size=(37, 1))
    rows[30] = 2 * rows[4] + 0.01 * rows[5]
    return np.asarray(rows)


@pytest.fixture
def means() -> Float:
    """Mean layers of 37 latents of the layers 0 to 5, some dead, some at the ends."""
    means = np.random.default_rng(1).uniform(0, 5, 37)
    means[[2, 3]] = 0, 5
    means[[7, 36]] = np.nan
    return means


def _cosines(a: Float, b: Float) -> Float:
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return np.asarray(a @ b.T)


def _pairs(rows: Float, means: Float, span: int = 5) -> tuple[DecoderPairs, int]:
    told: list[int] = []
    found = decoder_pairs(torch.from_numpy(rows), means, span, told.append)
    return found, sum(told)


@pytest.mark.parametrize("block", [1, 5, 36, 37, 2048])
def test_the_largest_cosine_with_another_latent(
    block: int, rows: Float, means: Float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "BLOCK", block)
    found, num_pairs = _pairs(rows, means)
    cosines = _cosines(rows, rows)
    np.fill_diagonal(cosines, -np.inf)
    np.testing.assert_allclose(found.nearest.cosines, cosines.max(axis=1), rtol=0, atol=1e-6)
    assert found.nearest.indices.tolist() == cosines.argmax(axis=1).tolist()
    assert found.mmcs == pytest.approx(cosines.max(axis=1).mean(), rel=1e-6)
    published = [max(0, *cosines[:i, i]) if i else 0 for i in range(37)]
    assert found.mmcs_published == pytest.approx(np.mean(published), rel=1e-6)
    assert num_pairs == 37 * 36 // 2


@pytest.mark.parametrize("block", [5, 2048])
def test_pairs_are_counted_by_distance_and_cosine(
    block: int, rows: Float, means: Float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "BLOCK", block)
    counts = _pairs(rows, means)[0].counts
    assert counts.shape == (21, COSINE_BINS)
    cosines = _cosines(rows, rows)
    expected = np.zeros_like(counts)
    for i in range(37):
        for j in range(i):
            distance = abs(means[i] - means[j])
            at = 20 if np.isnan(distance) else min(int(distance * 4), 19)
            expected[at, min(int((cosines[i, j] + 1) * 100), 199)] += 1
    np.testing.assert_array_equal(counts, expected)
    assert counts[20].sum() == 36 + 35


def test_a_single_latent_has_no_other() -> None:
    found, _ = _pairs(np.ones((1, 3)), np.zeros(1), span=0)
    assert found.mmcs is None
    assert np.isnan(found.nearest.cosines).tolist() == [True]
    assert found.nearest.indices.tolist() == [-1]
    assert found.mmcs_published == 0
    assert found.counts.sum() == 0


def test_opposite_and_equal_directions_are_in_the_outer_bins() -> None:
    found, _ = _pairs(np.array([[1.0, 1.0], [3.0, 3.0], [-2.0, -2.0]]), np.zeros(3), span=0)
    assert found.counts.shape == (2, COSINE_BINS)
    assert found.counts[0, [0, -1]].tolist() == [2, 1]
    assert found.mmcs == pytest.approx((1 + 1 - 1) / 3)
    assert found.mmcs_published == pytest.approx(1 / 3)


@pytest.mark.parametrize("block", [3, 2048])
def test_the_nearest_row_of_an_embedding(
    block: int, rows: Float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "BLOCK", block)
    embedding = np.random.default_rng(2).normal(size=(10, 6))
    embedding[3] = 0
    found = nearest_rows(torch.from_numpy(rows), torch.from_numpy(embedding))
    embedding[3] = 1
    cosines = np.delete(_cosines(rows, embedding), 3, axis=1)
    np.testing.assert_allclose(found.cosines, cosines.max(axis=1), rtol=0, atol=1e-6)
    at = cosines.argmax(axis=1)
    assert found.indices.tolist() == (at + (at >= 3)).tolist()


def test_histograms_hold_every_living_latent_and_every_pair(rows: Float, means: Float) -> None:
    means[10:20] = np.arange(10) % 6
    counts = _pairs(rows, means)[0].counts
    table = histograms_table(means, tuple(range(6)), counts, {}).to_pylist()
    parts = {row["histogram"] for row in table}
    by_name = {name: [row for row in table if row["histogram"] == name] for name in parts}
    alive = means[np.isfinite(means)]
    for row in by_name["layer_mean"]:
        assert row["count"] == ((alive >= row["low"]) & (alive < row["high"])).sum()
    assert sum(row["count"] for row in by_name["layer_mean"]) == 35
    away = np.abs(alive - np.round(alive))
    found = [row["count"] for row in by_name["layer_mean_to_whole"]]
    assert found[0] == (away < 1 / 32).sum() >= 12
    assert sum(found) == 35
    assert by_name["layer_mean_to_whole"][-1]["high"] == 0.5
    assert sum(row["count"] for row in by_name["decoder_cosine"]) == 37 * 36 // 2
    joint = layer_cosine_table(counts, {}).to_pylist()
    assert sum(row["count"] for row in joint) == 35 * 34 // 2
    for row in joint:
        assert row["distance_high"] == row["distance_low"] + 0.25
        at = round(row["distance_low"] * 4), round((row["cosine_low"] + 1) * 100)
        assert row["count"] == counts[at] > 0


def test_an_analysis_says_how_decoder_directions_lie(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    directory = sae_maker(world.store, num_latents=160)
    found = run(
        AnalyzeConfig(figures=False, cache=world.store, sae=directory, out=tmp_path / "out")
    )
    decoder = load_sae(directory).W_dec.detach().double().numpy()
    model = load_model(world.model).model
    cosines = _cosines(decoder, decoder)
    np.fill_diagonal(cosines, -1)
    latents = found.latents
    for cosine, index, expected in (
        ("decoder_cosine", "decoder_latent", cosines),
        (
            "embedding_cosine",
            "embedding_token",
            _cosines(decoder, model.get_input_embeddings().weight.double().numpy()),
        ),
        (
            "unembedding_cosine",
            "unembedding_token",
            _cosines(decoder, model.get_output_embeddings().weight.double().numpy()),
        ),
    ):
        assert latents[cosine].to_pylist() == pytest.approx(expected.max(axis=1), abs=1e-6)
        assert latents[index].to_pylist() == expected.argmax(axis=1).tolist()
    summary = found.summary["decoder"]
    assert summary["mmcs"] == pytest.approx(cosines.max(axis=1).mean(), rel=1e-6)
    assert summary["mean_unembedding_cosine"] == pytest.approx(
        np.mean(latents["unembedding_cosine"].to_pylist())
    )
    assert sum(found.layer_cosine["count"].to_pylist()) < 160 * 159 // 2
    assert set(found.histograms["histogram"].to_pylist()) == {
        "layer_mean",
        "layer_mean_to_whole",
        "decoder_cosine",
    }
