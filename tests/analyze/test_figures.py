"""Figures are drawn from tables of any size, with labelled axes and without a warning."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from matplotlib.image import imread

from mlsae.analyze import figures
from mlsae.analyze.columns import schema
from mlsae.analyze.directions import decoder_pairs
from mlsae.analyze.distribution import layer_distribution
from mlsae.analyze.histograms import histograms_table, layer_cosine_table


def _tables(
    num_latents: int, layers: tuple[int, ...], *, dead: float = 0.1, measured: bool = True
) -> dict[str, pa.Table]:
    generator = np.random.default_rng(0)
    totals = generator.random((len(layers), num_latents)) ** 3
    totals[:, : int(dead * num_latents)] = 0
    found = layer_distribution(totals, layers)
    is_dead = totals.sum(axis=0) == 0
    latents = {
        "latent": np.arange(num_latents),
        "layer_mean": pa.array(found.mean, mask=is_dead),
        "density": np.where(is_dead, 0, generator.random(num_latents) ** 4),
        "dead": is_dead,
    }
    by_layer = {
        "latent": np.repeat(np.arange(num_latents), len(layers)),
        "layer": np.tile(layers, num_latents),
        "prob": pa.array(found.probs.T.ravel(), mask=np.repeat(is_dead, len(layers))),
    }
    rows = [
        {
            "layer": layer,
            "fvu": 0.1 + 0.01 * n,
            "fvu_published": 0.05 + 0.01 * n,
            "norm": 10.0**n,
            "adjacent_cosine": 0.9 if n + 1 < len(layers) else None,
        }
        | ({"ce": 3.0, "ce_store": 3.001, "delta_ce": 0.1 * n} if measured else {})
        for n, layer in enumerate(layers)
    ]
    few = found.mean[:: max(1, num_latents // 1000)]
    directions = torch.from_numpy(generator.normal(size=(len(few), 8)))
    span = max(layers) - min(layers)
    counts = decoder_pairs(directions, few, span, lambda _: None).counts
    return {
        "layers": pa.Table.from_pylist(rows, schema=schema("layers", {})),
        "latents": pa.table(latents),
        "latent_layers": pa.table(by_layer),
        "histograms": histograms_table(found.mean, layers, counts, {}),
        "layer_cosine": layer_cosine_table(counts, {}),
    }


@pytest.mark.parametrize(
    ("num_latents", "layers", "dead", "measured"),
    [
        (1, (0,), 0.0, False),
        (16, (0, 1, 2), 0.1, True),
        (5000, (0, 3, 11), 0.1, True),
        (131_072, tuple(range(32)), 0.1, False),
        (10, (0, 1), 1.0, True),
    ],
)
def test_every_figure_is_drawn(
    tmp_path: Path, num_latents: int, layers: tuple[int, ...], dead: float, measured: bool
) -> None:
    tables = _tables(num_latents, layers, dead=dead, measured=measured)
    names = figures.draw_all(tmp_path, **tables)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        pixels = imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 400
        assert pixels[..., :3].std() > 0.01


def test_the_heat_map_is_sorted_by_mean_layer_and_leaves_the_dead_out() -> None:
    tables = _tables(40, (0, 1, 5))
    axes = figures.layer_distribution(tables["latents"], tables["latent_layers"]).axes[0]
    image = np.asarray(axes.images[0].get_array())
    assert image.shape == (3, 36)
    np.testing.assert_allclose(image.sum(axis=0), 1)
    means = np.array([0, 1, 5]) @ image
    assert (np.diff(means) >= 0).all()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "5"]
    assert "36 latents" in axes.get_title(loc="left")
    assert "(4 dead left out)" in axes.get_title(loc="left")


def test_many_latents_are_averaged_into_columns() -> None:
    tables = _tables(5000, (0, 1, 2))
    axes = figures.layer_distribution(tables["latents"], tables["latent_layers"]).axes[0]
    image = np.asarray(axes.images[0].get_array())
    assert image.shape == (3, 1200)
    np.testing.assert_allclose(image.sum(axis=0), 1)


def test_delta_ce_has_a_panel_only_where_it_was_measured() -> None:
    for measured, panels in ((True, 2), (False, 1)):
        figure = figures.fvu_delta_ce(_tables(4, (0, 1), measured=measured)["layers"])
        assert len(figure.axes) == panels
        assert all(axes.get_xlabel() == "layer" and axes.get_ylabel() for axes in figure.axes)
