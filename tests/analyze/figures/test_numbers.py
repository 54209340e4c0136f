"""Figures show the numbers that the tables hold."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from mlsae.analyze.results.figures import registry as figures
from mlsae.analyze.results.tables import schema

Float = npt.NDArray[np.float64]
Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("by", ["", "_by_count"])
def test_the_heat_map_is_sorted_by_mean_layer_and_leaves_the_dead_out(make: Make, by: str) -> None:
    parts = make(40, (0, 1, 5))
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


def test_many_latents_are_averaged_into_columns_of_equal_width(make: Make) -> None:
    parts = make(1700, (0, 1, 2), dead=0)
    axes = figures.draw("layer_distribution", parts).axes[0]
    image = np.asarray(axes.images[0].get_array())
    assert image.shape == (3, 1200)
    order = np.argsort(parts["latents"]["layer_mean"].to_numpy(), kind="stable")
    probs = parts["latent_layers"]["prob"].to_numpy().reshape(-1, 3)[order]
    for column in range(1200):
        of = probs[column * 1700 // 1200 : (column + 1) * 1700 // 1200]
        np.testing.assert_allclose(image[:, column], of.mean(axis=0))


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
        ("norm_cosine", 1, ("adjacent_cosine", "adjacent_cosine_pooled")),
    ],
)
def test_lines_by_layer_and_their_intervals_are_the_table(
    make: Make, name: str, panel: int, columns: tuple[str, ...]
) -> None:
    parts = make(16, (0, 3, 11))
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


def test_what_the_encoding_costs_has_a_line_where_it_was_measured(make: Make) -> None:
    parts = make(16, (0, 1))
    line = figures.draw("cross_entropy", parts).axes[0].lines[2]
    rows = parts["layers"].to_pylist()
    assert line.get_ydata().tolist() == [row["ce_store"] - row["ce"] for row in rows]
    rows = [row | {"ce_store": None} for row in rows]
    parts["layers"] = pa.Table.from_pylist(rows, schema=schema("layers", {}))
    labels = figures.draw("cross_entropy", parts).axes[0].get_legend_handles_labels()[1]
    assert not [label for label in labels if "store" in label]


def test_density_has_its_axis_beside_l0(make: Make) -> None:
    (right,) = figures.draw("sparsity", make(16, (0, 1))).axes[0].child_axes
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
    make: Make, name: str, panel: int, columns: tuple[str, ...]
) -> None:
    parts = make(400, (0, 1, 2, 3))
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


def test_means_are_marked(make: Make) -> None:
    parts = make(400, (0, 1, 2, 3))
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


def test_densities_are_counted_by_their_logarithm(make: Make) -> None:
    parts = make(400, (0, 1))
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
    make: Make, name: str, histograms: tuple[str, ...]
) -> None:
    parts = make(60, (0, 3, 11))
    for axes, histogram in zip(figures.draw(name, parts).axes, histograms, strict=False):
        ((counts, edges),) = _steps(axes)
        rows = [row for row in parts["histograms"].to_pylist() if row["histogram"] == histogram]
        assert counts == [row["count"] for row in rows]
        assert edges == pytest.approx([rows[0]["low"], *(row["high"] for row in rows)])


def test_layers_of_enough_rows_are_counted(make: Make) -> None:
    parts = make(50, (0, 1, 5))
    axes = figures.draw("num_layers", parts).axes[0]
    rows = parts["latent_layers"].to_pylist()
    labels = ["≥ 1", "≥ 10", "≥ 100", "≥ 1,000"]
    assert [line.get_label() for line in axes.lines] == labels
    for line, least in zip(axes.lines, (1, 10, 100, 1000), strict=True):
        passed = Counter(dict.fromkeys(range(5, 50), 0))
        passed.update(row["latent"] for row in rows if row["count"] >= least)
        shares = [sum(n == at for n in passed.values()) / 45 for at in range(4)]
        assert line.get_xdata().tolist() == [0, 1, 2, 3]
        assert line.get_ydata().tolist() == pytest.approx(shares)


def test_every_living_latent_is_in_the_map_of_its_spreads(make: Make) -> None:
    parts = make(300, (0, 1, 2))
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


def test_pairs_by_distance_are_shares_of_their_column(make: Make) -> None:
    parts = make(60, (0, 1, 5))
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


def test_the_map_of_pairs_shows_every_one_of_them(make: Make) -> None:
    """One pair in a million is the one that a reader looks for."""
    parts = make(60, (0, 1, 5))
    rows = [
        {"distance_low": 0, "distance_high": 0.25, "cosine_low": low, "cosine_high": low + 0.01,
         "count": count}
        for low, count in ((-0.97, 1), (0.0, 10**6), (0.98, 1))
    ]  # fmt: skip
    parts["layer_cosine"] = pa.Table.from_pylist(rows, schema=schema("layer_cosine", {}))
    axes = figures.draw("layer_cosine", parts).axes[0]
    low, high = axes.get_ylim()
    assert low <= -0.97
    assert high >= 0.99


def test_a_cosine_that_rounding_puts_above_1_is_counted(make: Make) -> None:
    parts = make(16, (0, 1))
    cosines = np.linspace(0, 1, 16) + 1e-7
    for name in ("decoder", "embedding", "unembedding"):
        at = parts["latents"].column_names.index(f"{name}_cosine")
        parts["latents"] = parts["latents"].set_column(at, f"{name}_cosine", pa.array(cosines))
    for name, panel in (("decoder_cosine", 1), ("embedding_cosine", 0)):
        axes = figures.draw(name, parts).axes[panel]
        assert [sum(counts) for counts, _ in _steps(axes)] == [16] * len(axes.patches)


def test_bars_are_the_terms_of_the_variance(make: Make) -> None:
    parts = make(16, (0, 1))
    first, second = figures.draw("layer_variance", parts).axes
    widths = [[bar.get_width() for bar in bars] for bars in first.containers]
    assert widths == [[0.125, 0.25], [0.375, 0.25], [0.5, 0.5]]
    lefts = [[bar.get_x() for bar in bars] for bars in first.containers]
    assert lefts == [[0, 0], [0.125, 0.25], [0.5, 0.5]]
    assert [bar.get_width() for bar in second.containers[0]] == [0.25, 0.25, 0.0123]
    assert [text.get_text() for text in second.texts] == ["0.25", "0.25", "0.0123"]


def test_a_variance_of_0_has_no_share(make: Make) -> None:
    parts = make(16, (0,))
    nothing = dict.fromkeys(("total", "single", "tokens", "latents", "aggregate"), 0.0)
    nothing |= dict.fromkeys(("single_over_aggregate", "aggregate_over_total"))
    found = dict.fromkeys(("mass", "pair_uniform", "as_coded"), nothing)
    parts["summary"]["layer_variance"] = found
    first, second = figures.draw("layer_variance", parts).axes
    assert [text.get_text() for text in first.texts] == ["all at one layer"] * 2
    assert [text.get_text() for text in second.texts] == ["not defined"] * 3


def test_latents_of_a_prompt_are_summed_over_its_eligible_tokens(make: Make) -> None:
    parts = make(30, (0, 3, 11))
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
    assert axes.get_xlabel().endswith("; 1 with values below 0.001 left out")
