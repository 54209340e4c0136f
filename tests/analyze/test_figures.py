"""Figures of tables of any size: labelled, equal to the tables, the same bytes again."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from mlsae.analyze import figures
from mlsae.analyze.columns import schema
from mlsae.analyze.directions import decoder_pairs
from mlsae.analyze.distribution import layer_distribution
from mlsae.analyze.histograms import histograms_table, layer_cosine_table
from mlsae.analyze.style import save
from mlsae.base.errors import InputError

Float = npt.NDArray[np.float64]
CE = ("ce", "ce_store", "delta_ce", "kl", "loss_recovered_zero", "loss_recovered_mean")


def _parts(
    num_latents: int, layers: tuple[int, ...], *, dead: float = 0.1, measured: bool = True
) -> dict[str, Any]:
    """What an analysis of so many latents could hold."""
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 3000, (len(layers), num_latents))
    counts[generator.random(counts.shape) < 0.3] = 0
    counts[0] += 1
    counts[:, : int(dead * num_latents)] = 0
    totals = counts * generator.gamma(4, 0.25, counts.shape)
    by_total = layer_distribution(totals, layers)
    by_count = layer_distribution(counts.astype(np.float64), layers)
    is_dead = counts.sum(axis=0) == 0

    def nullable(found: Float) -> pa.Array:
        return pa.array(found, mask=np.isnan(found))

    def of_living(found: Float) -> pa.Array:
        return pa.array(found, mask=is_dead)

    latents = {
        "latent": np.arange(num_latents, dtype=np.int32),
        "density": np.where(is_dead, 0, generator.random(num_latents) ** 4),
        "dead": is_dead,
        "layer_var_token": nullable(by_total.var * generator.beta(2, 2, num_latents)),
        "token_entropy": of_living(generator.gamma(2, 1, num_latents)),
    }
    for name in ("decoder", "embedding", "unembedding"):
        latents[f"{name}_cosine"] = generator.uniform(0.1, 0.9, num_latents)
    if num_latents == 1 or not measured:
        latents["decoder_cosine"] = pa.nulls(num_latents, pa.float64())
    for suffix, of in (("", by_total), ("_by_count", by_count)):
        latents[f"layer_mean{suffix}"] = nullable(of.mean)
        latents[f"layer_std{suffix}"] = nullable(np.sqrt(of.var))
        latents[f"layer_entropy{suffix}"] = nullable(of.entropy)
        latents[f"layer_bimodality{suffix}"] = nullable(of.bimodality)
    by_layer = {
        "latent": np.repeat(np.arange(num_latents), len(layers)),
        "layer": np.tile(layers, num_latents),
        "count": counts.T.ravel(),
        "prob": nullable(by_total.probs.T.ravel()),
        "prob_by_count": nullable(by_count.probs.T.ravel()),
    }
    rows = [_row(n, layer, num_latents, measured) for n, layer in enumerate(layers)]
    rows[-1]["adjacent_cosine"] = None
    few = by_total.mean[:: max(1, num_latents // 1000)]
    directions = torch.from_numpy(generator.normal(size=(len(few), 8)))
    pairs = decoder_pairs(directions, few, max(layers) - min(layers), lambda _: None).counts
    events = [
        {
            "prompt": 0,
            "position": n % 7,
            "token_id": 1,
            "piece": " a",
            "eligible": n % 7 > 0,
            "layer": layers[n % len(layers)],
            "latent": num_latents - 1 if n < 20 else n * n % max(1, num_latents - 1),
            "value": 1e-4 if n < 20 else 1.0 + n,
        }
        for n in range(100)
    ]
    terms = {"total": 4.0, "single": 0.5, "tokens": 1.5, "latents": 2.0, "aggregate": 2.0}
    ratios = {"single_over_aggregate": 0.25, "aggregate_over_total": 0.5}
    return {
        "layers": pa.Table.from_pylist(rows, schema=schema("layers", {})),
        "latents": pa.table(latents),
        "latent_layers": pa.table(by_layer),
        "histograms": histograms_table(by_total.mean, layers, pairs, {}),
        "layer_cosine": layer_cosine_table(pairs, {}),
        "prompts": pa.Table.from_pylist(events, schema=schema("prompts", {})),
        "summary": {
            "prompts": ["Once upon a time"],
            "decoder": {"mmcs": None if num_latents == 1 else 0.345},
            "layer_variance": {
                "mass": terms | ratios,
                "pair_uniform": terms | {"single": 1.0, "tokens": 1.0} | ratios,
                "as_coded": {"single_over_aggregate": 0.0123, "aggregate_over_total": None},
            },
        },
    }


def _row(n: int, layer: int, num_latents: int, measured: bool) -> dict[str, Any]:
    of = {
        "fvu": 0.1 + 0.01 * n,
        "fvu_published": 0.05 + 0.01 * n,
        "cosine": 0.95 - 0.01 * n,
        "relative_reconstruction_bias": 1 + 0.01 * n,
        "l0": 8.0 - 0.1 * n,
        "density": (8.0 - 0.1 * n) / num_latents,
    }
    if measured:
        of |= {name: 0.3 + 0.01 * n + 0.1 * k for k, name in enumerate(CE)}
        of["top1_agreement"] = 0.9
    ends = {f"{name}_{end}": value * by for name, value in of.items() for end, by in _ENDS}
    return {
        "layer": layer,
        "norm": 10.0**n,
        "adjacent_cosine": 0.9,
        "dead_fraction": 0.1,
        "frequent_fraction": 0.02,
        "always_on_fraction": 0.0,
        **of,
        **ends,
    }


_ENDS = (("low", 0.9), ("high", 1.05))


@pytest.mark.parametrize(
    ("num_latents", "layers", "dead", "measured"),
    [
        (1, (0,), 0.0, False),
        (16, (0, 1, 2), 0.1, True),
        (5000, (0, 3, 11), 0.1, True),
        (10, (0, 1), 1.0, True),
    ],
)
def test_every_figure_can_be_drawn_and_is_labelled(
    num_latents: int, layers: tuple[int, ...], dead: float, measured: bool
) -> None:
    parts = _parts(num_latents, layers, dead=dead, measured=measured)
    expected = [*figures.FIGURES, "prompt_0"]
    if not measured:
        expected.remove("cross_entropy")
    assert list(figures.names(parts)) == expected
    for name in expected:
        figure = figures.draw(name, parts)
        figure.draw_without_rendering()
        _check_labels(figure)


def test_every_figure_is_written_as_picture_and_as_text(tmp_path: Path) -> None:
    parts = _parts(16, (0, 1, 2))
    told: list[int] = []
    names = figures.draw_all(tmp_path, parts, told.append)
    expected = [*figures.FIGURES, "prompt_0"]
    assert names == [f"{name}.{suffix}" for name in expected for suffix in ("png", "svg")]
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert told == [1] * len(expected)
    for name in expected:
        pixels = imread(tmp_path / f"{name}.png")
        assert pixels.shape[1] in (660, 1350)
        assert pixels[..., :3].std() > 0.01
        _check_svg(tmp_path / f"{name}.svg")


def _check_labels(figure: Figure) -> None:
    for axes in figure.axes:
        is_bar = axes.get_label() == "<colorbar>"
        assert axes.get_ylabel()
        assert is_bar or axes.get_xlabel()
        for child in axes.child_axes:
            assert child.get_ylabel()
        assert is_bar or axes.get_title(loc="left")


def _check_svg(path: Path) -> None:
    """Text is text, its date is nowhere, and dense meshes are a picture."""
    text = path.read_text("utf-8")
    assert "<text " in text
    assert "dc:date" not in text
    assert len(text) < 150_000


def test_131072_latents_take_seconds_and_little_room(tmp_path: Path) -> None:
    parts = _parts(131_072, tuple(range(16)))
    start = time.process_time()
    names = figures.draw_all(tmp_path, parts, lambda _: None)
    assert time.process_time() - start < 20
    assert max((tmp_path / name).stat().st_size for name in names) < 200_000
    axes = figures.draw("layer_distribution", parts).axes[0]
    image = np.asarray(axes.images[0].get_array())
    assert image.shape == (16, 1200)
    np.testing.assert_allclose(image.sum(axis=0), 1)


def test_a_figure_that_cannot_be_drawn_has_no_name() -> None:
    parts = _parts(16, (0, 1), measured=False)
    for name in ("embedding", "unembedding"):
        at = parts["latents"].column_names.index(f"{name}_cosine")
        nulls = pa.nulls(16, pa.float64())
        parts["latents"] = parts["latents"].set_column(at, f"{name}_cosine", nulls)
    parts["summary"] |= {"layer_variance": None, "prompts": []}
    left_out = {"cross_entropy", "embedding_cosine", "layer_variance"}
    assert set(figures.FIGURES) - set(figures.names(parts)) == left_out
    for name in (*left_out, "prompt_0", "poem"):
        with pytest.raises(InputError, match=f"there is no figure '{name}': the figures are recon"):
            figures.draw(name, parts)


@pytest.mark.parametrize("by", ["", "_by_count"])
def test_the_heat_map_is_sorted_by_mean_layer_and_leaves_the_dead_out(by: str) -> None:
    parts = _parts(40, (0, 1, 5))
    figure = figures.draw(f"layer_distribution{by}", parts)
    axes = figure.axes[0]
    image = np.asarray(axes.images[0].get_array())
    rows = parts["latent_layers"].to_pylist()
    probs = {
        latent: [row[f"prob{by}"] for row in rows if row["latent"] == latent]
        for latent in range(4, 40)
    }
    means = {latent: p[1] + 5 * p[2] for latent, p in probs.items()}
    np.testing.assert_allclose(image.T, [probs[n] for n in sorted(means, key=means.__getitem__)])
    heights = np.interp(sorted(means.values()), [0, 1, 5], [0, 1, 2])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), heights, atol=1e-12)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "5"]
    assert "36 latents" in axes.get_title(loc="left")
    assert "(4 dead left out)" in axes.get_title(loc="left")


def test_many_latents_are_averaged_into_columns_of_equal_width() -> None:
    parts = _parts(1700, (0, 1, 2), dead=0)
    axes = figures.draw("layer_distribution", parts).axes[0]
    image = np.asarray(axes.images[0].get_array())
    assert image.shape == (3, 1200)
    order = np.argsort(parts["latents"]["layer_mean"].to_numpy(), kind="stable")
    probs = parts["latent_layers"]["prob"].to_numpy().reshape(-1, 3)[order]
    for column in range(1200):
        of = probs[column * 1700 // 1200 : (column + 1) * 1700 // 1200]
        np.testing.assert_allclose(image[:, column], of.mean(axis=0))


def test_few_latents_are_named() -> None:
    axes = figures.draw("layer_distribution", _parts(8, (0, 1), dead=0)).axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert sorted(names) == [str(n) for n in range(8)]


@pytest.mark.parametrize(
    ("name", "panel", "columns"),
    [
        ("reconstruction", 0, ("fvu", "fvu_published")),
        ("reconstruction", 1, ("cosine", "relative_reconstruction_bias")),
        ("sparsity", 0, ("l0",)),
        ("sparsity", 1, ("dead_fraction", "frequent_fraction", "always_on_fraction")),
        ("cross_entropy", 0, ("delta_ce", "kl")),
        ("cross_entropy", 1, ("loss_recovered_zero", "loss_recovered_mean", "top1_agreement")),
        ("norm_cosine", 0, ("norm",)),
        ("norm_cosine", 1, ("adjacent_cosine",)),
    ],
)
def test_lines_by_layer_and_their_intervals_are_the_table(
    name: str, panel: int, columns: tuple[str, ...]
) -> None:
    parts = _parts(16, (0, 3, 11))
    axes = figures.draw(name, parts).axes[panel]
    layers = parts["layers"]
    intervals = iter(axes.collections)
    for line, column in zip(axes.lines, columns, strict=False):
        assert line.get_xdata().tolist() == [0, 3, 11]
        np.testing.assert_array_equal(line.get_ydata(), _numbers(layers, column))
        if f"{column}_low" in layers.column_names:
            for segment, row in zip(
                next(intervals).get_segments(), layers.to_pylist(), strict=True
            ):
                ends = [[row["layer"], row[f"{column}_{end}"]] for end in ("low", "high")]
                assert segment.tolist() == ends
    assert next(intervals, None) is None
    labels = axes.get_legend_handles_labels()[1]
    assert len(set(labels)) == len(labels)
    assert len(labels) in (0, len(columns), len(columns) + 1)


def _numbers(table: pa.Table, column: str) -> Float:
    return np.array([np.nan if x is None else x for x in table[column].to_pylist()])


def test_what_the_encoding_costs_has_a_line_where_it_was_measured() -> None:
    parts = _parts(16, (0, 1))
    line = figures.draw("cross_entropy", parts).axes[0].lines[2]
    rows = parts["layers"].to_pylist()
    assert line.get_ydata().tolist() == [row["ce_store"] - row["ce"] for row in rows]
    rows = [row | {"ce_store": None} for row in rows]
    parts["layers"] = pa.Table.from_pylist(rows, schema=schema("layers", {}))
    labels = figures.draw("cross_entropy", parts).axes[0].get_legend_handles_labels()[1]
    assert not [label for label in labels if "store" in label]


def test_density_has_its_axis_beside_l0() -> None:
    (right,) = figures.draw("sparsity", _parts(16, (0, 1))).axes[0].child_axes
    forth, back = right._functions
    assert forth(8.0) == pytest.approx(50)
    assert back(50) == pytest.approx(8.0)


def _steps(axes: Any) -> list[tuple[list[float], list[float]]]:
    """Counts and edges of every histogram of a panel."""
    data = [patch.get_data() for patch in axes.patches]
    return [(d.values.tolist(), d.edges.tolist()) for d in data]


@pytest.mark.parametrize(
    ("name", "panel", "columns"),
    [
        ("layer_std", 0, ("layer_std", "layer_std_by_count")),
        ("layer_entropy", 0, ("layer_entropy", "layer_entropy_by_count")),
        ("bimodality", 0, ("layer_bimodality", "layer_bimodality_by_count")),
        ("token_entropy", 0, ("token_entropy",)),
        ("decoder_cosine", 1, ("decoder_cosine",)),
        ("embedding_cosine", 0, ("embedding_cosine", "unembedding_cosine")),
    ],
)
def test_histograms_of_latents_count_every_one_of_them(
    name: str, panel: int, columns: tuple[str, ...]
) -> None:
    parts = _parts(400, (0, 1, 2, 3))
    axes = figures.draw(name, parts).axes[panel]
    for (counts, edges), column in zip(_steps(axes), columns, strict=True):
        found = [x for x in parts["latents"][column].to_pylist() if x is not None]
        assert sum(counts) == len(found) > 300
        _check_counts(counts, edges, found)


def _check_counts(counts: list[float], edges: list[float], found: list[float]) -> None:
    expected = [0] * len(counts)
    for value in found:
        inside = [n for n in range(len(counts)) if edges[n] <= value < edges[n + 1]]
        # The last bin has both its ends, and takes in what rounding puts just past it.
        expected[inside[0] if inside else len(counts) - 1] += 1
    assert counts == expected


def test_means_are_marked() -> None:
    parts = _parts(400, (0, 1, 2, 3))
    latents = parts["latents"].to_pylist()
    living = [row for row in latents if not row["dead"]]
    mean = sum(row["layer_std"] for row in living) / len(living)
    axes = figures.draw("layer_std", parts).axes[0]
    (line,) = [line for line in axes.lines if f"{mean:#.3g}" in str(line.get_label())]
    assert line.get_xdata() == pytest.approx([mean, mean])
    axes = figures.draw("decoder_cosine", parts).axes[1]
    assert axes.lines[0].get_label() == "mean (MMCS) 0.345"
    mean = sum(row["embedding_cosine"] for row in latents) / 400
    labels = figures.draw("embedding_cosine", parts).axes[0].get_legend_handles_labels()[1]
    assert labels[0] == f"embedding W_E (mean {mean:#.3g})"


def test_densities_are_counted_by_their_logarithm() -> None:
    parts = _parts(400, (0, 1))
    axes = figures.draw("density", parts).axes[0]
    ((counts, edges),) = _steps(axes)
    alive = [row["density"] for row in parts["latents"].to_pylist() if not row["dead"]]
    _check_counts(counts, edges, np.log10(alive).tolist())
    assert axes.get_title(loc="left") == "360 living latents, 40 dead"


@pytest.mark.parametrize(
    ("name", "histograms"),
    [
        ("mean_layer", ("layer_mean", "layer_mean_to_whole")),
        ("decoder_cosine", ("decoder_cosine",)),
    ],
)
def test_histograms_of_the_table_are_drawn_as_they_are(
    name: str, histograms: tuple[str, ...]
) -> None:
    parts = _parts(60, (0, 3, 11))
    for axes, histogram in zip(figures.draw(name, parts).axes, histograms, strict=False):
        ((counts, edges),) = _steps(axes)
        rows = [row for row in parts["histograms"].to_pylist() if row["histogram"] == histogram]
        assert counts == [row["count"] for row in rows]
        assert edges == pytest.approx([rows[0]["low"], *(row["high"] for row in rows)])


def test_layers_of_enough_rows_are_counted() -> None:
    parts = _parts(50, (0, 1, 5))
    axes = figures.draw("num_layers", parts).axes[0]
    rows = parts["latent_layers"].to_pylist()
    labels = ["≥ 1 row", "≥ 10 rows", "≥ 100 rows", "≥ 1,000 rows"]
    assert [line.get_label() for line in axes.lines] == labels
    for line, least in zip(axes.lines, (1, 10, 100, 1000), strict=True):
        passed = Counter(dict.fromkeys(range(5, 50), 0))
        passed.update(row["latent"] for row in rows if row["count"] >= least)
        shares = [sum(n == at for n in passed.values()) / 45 for at in range(4)]
        assert line.get_xdata().tolist() == [0, 1, 2, 3]
        assert line.get_ydata().tolist() == pytest.approx(shares)


def test_every_living_latent_is_in_the_map_of_its_spreads() -> None:
    parts = _parts(300, (0, 1, 2))
    (mesh,) = figures.draw("layer_std", parts).axes[1].collections
    counts = np.ma.filled(mesh.get_array(), 0)
    edges = mesh.get_coordinates()[0, :, 0]
    expected = np.zeros_like(counts)
    for row in parts["latents"].to_pylist():
        if not row["dead"]:
            both = (row["layer_var_token"] ** 0.5, row["layer_std"])
            at = [min(int(np.searchsorted(edges, x, "right")) - 1, len(edges) - 2) for x in both]
            expected[at[0], at[1]] += 1
    np.testing.assert_array_equal(counts, expected)


def test_pairs_by_distance_are_shares_of_their_column() -> None:
    parts = _parts(60, (0, 1, 5))
    (mesh,) = figures.draw("layer_cosine", parts).axes[0].collections
    shares = np.ma.filled(mesh.get_array(), 0)
    table = parts["layer_cosine"].to_pylist()
    for x, low in enumerate(mesh.get_coordinates()[0, :-1, 0]):
        column = [row for row in table if row["distance_low"] == low]
        total = sum(row["count"] for row in column)
        for row in column:
            y = int(np.argmin(abs(mesh.get_coordinates()[:, 0, 1] - row["cosine_low"])))
            assert shares[y, x] == pytest.approx(row["count"] / total)
        assert (shares[:, x] > 0).sum() == len(column)


def test_bars_are_the_terms_of_the_variance() -> None:
    parts = _parts(16, (0, 1))
    first, second = figures.draw("layer_variance", parts).axes
    widths = [[bar.get_width() for bar in bars] for bars in first.containers]
    assert widths == [[0.125, 0.25], [0.375, 0.25], [0.5, 0.5]]
    lefts = [[bar.get_x() for bar in bars] for bars in first.containers]
    assert lefts == [[0, 0], [0.125, 0.25], [0.5, 0.5]]
    assert [bar.get_width() for bar in second.containers[0]] == [0.25, 0.25, 0.0123]
    assert [text.get_text() for text in second.texts] == ["0.25", "0.25", "0.0123"]


def test_a_variance_of_0_has_no_share() -> None:
    parts = _parts(16, (0,))
    nothing = dict.fromkeys(("total", "single", "tokens", "latents", "aggregate"), 0.0)
    nothing |= dict.fromkeys(("single_over_aggregate", "aggregate_over_total"))
    found = dict.fromkeys(("mass", "pair_uniform", "as_coded"), nothing)
    parts["summary"]["layer_variance"] = found
    first, second = figures.draw("layer_variance", parts).axes
    assert [text.get_text() for text in first.texts] == ["all at one layer"] * 2
    assert [text.get_text() for text in second.texts] == ["not defined"] * 3


def test_latents_of_a_prompt_are_summed_over_its_eligible_tokens() -> None:
    parts = _parts(30, (0, 3, 11))
    totals: dict[int, dict[int, float]] = {}
    largest: Counter[int] = Counter()
    for row in parts["prompts"].to_pylist():
        if row["eligible"]:
            at = totals.setdefault(row["latent"], dict.fromkeys((0, 3, 11), 0.0))
            at[row["layer"]] += row["value"]
            largest[row["latent"]] = max(largest[row["latent"]], row["value"])
    probs = {
        latent: [total / sum(at.values()) for total in at.values()]
        for latent, at in totals.items()
        if largest[latent] >= 1e-3
    }
    means = {latent: 3 * p[1] + 11 * p[2] for latent, p in probs.items()}
    axes = figures.draw("prompt_0", parts).axes[0]
    order = [int(label.get_text()) for label in axes.get_xticklabels()]
    assert sorted(order) == sorted(probs)
    assert [means[n] for n in order] == pytest.approx(sorted(means.values()))
    image = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(image.T, [probs[n] for n in order])
    title = f"{len(probs)} latents of “Once upon a time”"
    assert axes.get_title(loc="left") == title


def test_a_long_prompt_is_shortened_in_its_title_and_what_cannot_be_shown_is_a_space() -> None:
    parts = _parts(30, (0, 1))
    parts["summary"]["prompts"] = ["a\n\x00b" + " word" * 40]
    title = figures.draw("prompt_0", parts).axes[0].get_title(loc="left")
    assert "“a b word word" in title
    assert title.endswith("…”")
    assert len(title) < 130


def test_a_figure_is_the_same_bytes_again(tmp_path: Path) -> None:
    """Also in another process, where hashes of strings differ."""
    script = Path(__file__)
    again = (
        "import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('own', {str(script)!r})\n"
        "own = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(own)\n"
        "own.draw_some(pathlib.Path(sys.argv[1]))\n"
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    draw_some(tmp_path / "a")
    subprocess.run([sys.executable, "-c", again, str(tmp_path / "b")], check=True)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def draw_some(directory: Path) -> None:
    parts = _parts(100, (0, 1, 2))
    for name in ("layer_std", "layer_distribution", "sparsity"):
        assert save(figures.draw(name, parts), directory, name) == [f"{name}.png", f"{name}.svg"]


def test_every_figure_has_its_place_in_an_analysis(
    world: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    from mlsae.analyze import AnalyzeConfig, load, run

    run(AnalyzeConfig(cache=world.store, sae=sae_maker(world.store), out=tmp_path / "out"))
    analysis = load(tmp_path / "out")
    assert analysis.figures == tuple(figures.FIGURES)
    assert analysis.summary["figures"] == [
        f"figures/{name}.{suffix}" for name in analysis.figures for suffix in ("png", "svg")
    ]
    for name in ("sparsity", "layer_cosine"):
        save(analysis.figure(name), tmp_path, name)
        for suffix in ("png", "svg"):
            drawn = analysis.path / "figures" / f"{name}.{suffix}"
            assert drawn.read_bytes() == (tmp_path / f"{name}.{suffix}").read_bytes()
    with pytest.raises(InputError, match="there is no figure 'poem'"):
        analysis.figure("poem")
