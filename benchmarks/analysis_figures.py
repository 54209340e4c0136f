"""The figures of docs/evidence/analysis.md from its JSON."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from mlsae.analyze.results.figures.style import BLUE, GREY, ORANGE, STYLE

GREEN, PINK, YELLOW = "#009E73", "#CC79A7", "#E69F00"
LOOKS: dict[str, dict[str, Any]] = {
    "trained": {"color": "black", "marker": "o", "linewidth": 2.2},
    "rerandomized": {"color": BLUE, "marker": "s"},
    "rerandomized-keep-embeddings": {"color": GREEN, "marker": "^"},
    "random": {"color": ORANGE, "marker": "D"},
    "control": {"color": PINK, "marker": "v"},
}
"""Colour and marker of each variant, in order."""
SHORT = {"rerandomized-keep-embeddings": "keep-embeddings"}
METRICS = (
    ("cosine", "Cosine of x and x̂"),
    ("fvu", "FVU"),
    ("l1", "L1, latent values a row"),
    ("delta_ce", "Delta CE, nats / token"),
    ("token_entropy", "Token entropy, nats"),
    ("token_entropy_strongest", "Its 40 strongest, nats"),
)
DPI = 120
LEAST_PAIRS = 30
"""Pairs of rows that a bin has to have to be shown."""


def draw_all(content: dict[str, Any], folder: Path) -> list[str]:
    """Write every figure into `folder` as PNG; their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({**STYLE, "axes.titlesize": 9, "font.size": 8}):
        for name, figure in FIGURES.items():
            figure(content).savefig(folder / f"{name}.png", dpi=DPI)
    return [f"{name}.png" for name in FIGURES]


def of_init(study: dict[str, Any], init: str, key: str = "saes") -> list[dict[str, Any]]:
    """The runs of a variant, by seed."""
    return [run for run in study[key] if run["init"] == init]


def _short(init: str) -> str:
    return SHORT.get(init, init)


def _variants(study: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    for init, look in LOOKS.items():
        yield init, of_init(study, init), look


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _metrics(content: dict[str, Any]) -> Figure:
    """Six metrics by layer: a line the mean over seeds, the band from lowest to highest."""
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True)
    for (name, title), axes in zip(METRICS, grid.flat, strict=True):
        for init, saes, look in _variants(content["variants"]):
            values = np.array([[of[name] for of in sae["layers"]] for sae in saes], dtype=float)
            layers = [of["layer"] for of in saes[0]["layers"]]
            axes.plot(layers, values.mean(axis=0), label=_short(init), **look)
            axes.fill_between(
                layers, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.2
            )
        axes.set_title(title)
        axes.set_xticks(layers)
    for axes in grid[1]:
        axes.set_xlabel("layer")
    grid[0][1].set_ylim(bottom=0)
    grid[1][0].axhline(0, color=GREY, linewidth=0.8, zorder=1)
    for axes in grid[1][1:]:
        axes.set_ylim(bottom=0)
    _legend(figure, grid[0][0], len(LOOKS))
    return figure


def _decomposition(content: dict[str, Any]) -> Figure:
    """The terms of the variance of the layer, and single over aggregate by three definitions."""
    runs = {_short(init): saes for init, saes, _ in _variants(content["variants"])}
    runs["demo model"] = content["demo"]["saes"]
    figure = Figure(figsize=(7.6, 3.1), layout="constrained")
    first, second = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(runs))[::-1]
    left = np.zeros(len(runs))
    terms = (
        ("single", "single: at one token", BLUE),
        ("tokens", "tokens: between tokens", YELLOW),
        ("latents", "latents: between latents", "#bbbbbb"),
    )
    for name, label, colour in terms:
        width = np.array(
            [mean(_variance(sae, "mass", name) for sae in saes) for saes in runs.values()]
        )
        first.barh(places, width, left=left, color=colour, label=label, height=0.6)
        left += width
    first.set_yticks(places, list(runs))
    first.set(title="Variance of the layer, by mass", xlabel="layer²")
    first.set_xlim(0, 1.02 * left.max())
    first.grid(visible=False, axis="y")
    kinds = (
        ("mass", "mass", BLUE, "o"),
        ("pair_uniform", "pair-uniform", GREEN, "s"),
        ("as_coded", "as coded", ORANGE, "^"),
    )
    for kind, label, colour, marker in kinds:
        for place, saes in zip(places, runs.values(), strict=True):
            ratios = [sae["layer_variance"][kind]["single_over_aggregate"] for sae in saes]
            second.plot(
                ratios,
                [place] * len(ratios),
                marker,
                color=colour,
                markersize=5,
                label=label if place == places[0] else None,
            )
    second.axvline(0.01, color=GREY, linestyle=":", linewidth=1)
    second.text(0.02, places[0] + 0.35, "1/100, as published", color=GREY, fontsize=7)
    second.set(title="Single-token over aggregate", xlabel="ratio; a mark a seed", xlim=(0, 1))
    second.set_ylim(-0.6, places[0] + 0.75)
    for axes in (first, second):
        handles, _ = axes.get_legend_handles_labels()
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=len(handles), fontsize=7,
            handlelength=1.2, columnspacing=1,
        )  # fmt: skip
    return figure


def _variance(sae: dict[str, Any], kind: str, term: str) -> float:
    value: float = sae["layer_variance"][kind][term]
    return value


def _layers(content: dict[str, Any]) -> Figure:
    """At how many layers a latent is active: for a token, and over the data set."""
    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    panels = figure.subplots(1, 2)
    shown = (
        ("pairs_by_layers", "Layers of a latent at one token", "active (token, latent) pairs"),
        ("num_layers_histogram", "Layers of a latent over the data set", "living latents"),
    )
    for axes, (key, title, label) in zip(panels, shown, strict=True):
        for init, saes, look in _variants(content["variants"]):
            shares = np.array([np.array(sae[key]) / sum(sae[key]) for sae in saes])
            places = np.arange(1, shares.shape[1] + 1)
            axes.plot(places, shares.mean(axis=0), label=_short(init), **look)
            low, high = shares.min(axis=0), shares.max(axis=0)
            axes.fill_between(places, low, high, color=look["color"], alpha=0.2)
        axes.set(title=title, xlabel="number of layers", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, panels[0], len(LOOKS))
    return figure


def _heat(content: dict[str, Any]) -> Figure:
    """P(layer | latent) of seed 0, latents by their mean layer, a panel a variant."""
    maps = {_short(init): content["variants"]["heat"][init] for init in LOOKS}
    maps["demo model"] = content["demo"]["heat"]
    figure = Figure(figsize=(7.6, 3.9), layout="constrained")
    grid = figure.subplots(2, 3)
    for (name, lines), axes in zip(maps.items(), grid.flat, strict=True):
        percent = np.array([[int(value) for value in line.split()] for line in lines])
        image = axes.imshow(
            percent.T / 100,
            aspect="auto",
            origin="lower",
            cmap="viridis",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        axes.set_title(f"{name}: {len(percent):,} latents")
        axes.grid(visible=False)
        axes.set_yticks(range(percent.shape[1]))
        axes.set_xticks([0, 500, 1000])
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
    for axes in grid[-1]:
        axes.set_xlabel("latent, by mean layer")
    figure.colorbar(image, ax=grid, label="P(layer | latent)", pad=0.02)
    return figure


def bins(kind: dict[str, Any], edges: Sequence[float]) -> list[tuple[float, float, int]]:
    """Middle of the bin, share of active latents shared, pairs; bins with enough pairs."""
    return [
        ((low + high) / 2, both / pairs, pairs)
        for low, high, both, pairs in zip(
            edges[:-1], edges[1:], kind["shared"], kind["pairs"], strict=True
        )
        if pairs >= LEAST_PAIRS
    ]


def _similarity(content: dict[str, Any]) -> Figure:
    """Latents that two rows share, against their cosine: of one token, or at one layer."""
    figure = Figure(figsize=(7.6, 2.5), layout="constrained")
    panels = figure.subplots(1, len(LOOKS), sharey=True, sharex=True)
    kinds = (
        ("one_token", "one token, two layers", BLUE, "-", "o"),
        ("one_layer", "two tokens, one layer", ORANGE, "--", "s"),
        ("neither", "two tokens, two layers", GREY, ":", "^"),
    )
    for axes, init in zip(panels, LOOKS, strict=True):
        run = of_init(content["variants"], init, "similarity")[0]
        for key, label, colour, line, marker in kinds:
            shown = bins(run[key], run["edges"])
            axes.plot(
                [at for at, *_ in shown], [share for _, share, _ in shown], line,
                color=colour, marker=marker, markersize=2.5, label=label, linewidth=1.2,
            )  # fmt: skip
        axes.set_title(_short(init))
        axes.set(xlim=(-0.6, 1.02), ylim=(0, 1), xticks=[-0.5, 0, 0.5, 1])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].set_ylabel("active latents shared")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[2].set_xlabel("cosine of the two rows, as encoded")
    _legend(figure, panels[0], len(kinds))
    return figure


def layer_pairs(study: dict[str, Any], init: str) -> list[tuple[float, float, bool]]:
    """Cosine, share of latents shared, and adjacency of every two layers of a variant."""
    saes = of_init(study, init)
    found = []
    for place, of in enumerate(study["stores"][init]["cosine"]):
        shared = mean(sae["shared"][place]["shared"] for sae in saes)
        low, high = of["layers"]
        found.append((of["cosine"], shared, high - low == 1))
    return found


def adjacent_cosine(sae: dict[str, Any]) -> float:
    """Mean over the layers that have a next one."""
    found = [of["adjacent_cosine_pooled"] for of in sae["layers"]]
    return float(mean(cosine for cosine in found if cosine is not None))


def _confound(content: dict[str, Any]) -> Figure:
    """Likeness of layers against shared latents and against the decomposition."""
    figure = Figure(figsize=(7.6, 3.1), layout="constrained")
    first, second = figure.subplots(1, 2)
    for init, saes, look in _variants(content["variants"]):
        style = {"color": look["color"], "marker": look["marker"], "linestyle": ""}
        for adjacent in (True, False):
            points = [of[:2] for of in layer_pairs(content["variants"], init) if of[2] == adjacent]
            first.plot(
                *zip(*points, strict=True),
                **style,
                fillstyle="full" if adjacent else "none",
                label=_short(init) if adjacent else None,
            )
        ratios = [sae["layer_variance"]["mass"]["single_over_aggregate"] for sae in saes]
        second.plot([adjacent_cosine(sae) for sae in saes], ratios, **style)
    demo = content["demo"]
    second.plot(
        [adjacent_cosine(sae) for sae in demo["saes"]],
        [sae["layer_variance"]["mass"]["single_over_aggregate"] for sae in demo["saes"]],
        "*", color=YELLOW, markersize=8, label="demo model",
    )  # fmt: skip
    first.set(
        title="Two layers of a token (filled: adjacent)",
        xlabel="centred cosine of the two layers",
        ylabel="active latents shared",
    )
    first.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    first.set_ylim(bottom=0)
    second.set(
        title="An SAE each",
        xlabel="mean centred cosine of adjacent layers",
        ylabel="single-token / aggregate, mass",
    )
    second.set_ylim(bottom=0)
    second.legend(loc="lower right")
    _legend(figure, first, len(LOOKS))
    return figure


def by_size(study: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """(latents, k) → its seeds."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for sae in study["saes"]:
        found.setdefault((sae["num_latents"], sae["k"]), []).append(sae)
    return dict(sorted(found.items()))


def _sizes(content: dict[str, Any]) -> Figure:
    """Single over aggregate, and layers of a pair, by number of latents and by k."""
    runs = by_size(content["sizes"])
    middle = sorted({size for size, _ in runs})[1], sorted({k for _, k in runs})[1]
    figure = Figure(figsize=(7.6, 2.7), layout="constrained")
    grid = figure.subplots(1, 4, sharey=False)
    axis_of = ((0, f"latents, k {middle[1]}"), (1, f"k, {middle[0]:,} latents"))
    kinds = (
        ("mass", "mass", BLUE, "o-"),
        ("pair_uniform", "pair-uniform", GREEN, "s--"),
        ("as_coded", "as coded", ORANGE, "^:"),
    )
    for column, (part, label) in enumerate(axis_of):
        keys = [key for key in runs if key[1 - part] == middle[1 - part]]
        values = [key[part] for key in keys]
        ratio, number = grid[column], grid[2 + column]
        for kind, name, colour, line in kinds:
            seeds = np.array(
                [
                    [sae["layer_variance"][kind]["single_over_aggregate"] for sae in runs[key]]
                    for key in keys
                ]
            )
            ratio.plot(values, seeds.mean(axis=1), line, color=colour, label=name)
            ratio.fill_between(values, seeds.min(1), seeds.max(1), color=colour, alpha=0.2)
        pairs = [[sae["layer_variance"]["layers_of_a_pair"] for sae in runs[key]] for key in keys]
        number.plot(values, np.mean(pairs, axis=1), "o-", color=BLUE)
        number.fill_between(values, np.min(pairs, axis=1), np.max(pairs, axis=1), alpha=0.2)
        for axes in (ratio, number):
            axes.set_xscale("log", base=4)
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.set_xlabel(label)
        ratio.set_title("Single / aggregate")
        ratio.set_ylim(0, 1)
        number.set_title("Layers of a pair")
        number.set_ylim(1, 5)
    _legend(figure, grid[0], len(kinds))
    return figure


FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "metrics": _metrics,
    "layers": _layers,
    "heat": _heat,
    "decomposition": _decomposition,
    "similarity": _similarity,
    "confound": _confound,
    "sizes": _sizes,
}
