"""The figures of docs/evidence/training.md from its JSON."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from mlsae.analyze.results.figures.style import STYLE

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "D")


def draw(study: str, content: dict[str, Any], folder: Path) -> None:
    """Write the figure of a study, `folder`/`study`.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = FIGURES[study](content)
        figure.savefig(folder / f"{study}.png")


def _figure(num_panels: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7.0, height), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False, **options)
    return figure, list(panels[0])


def _values_on(axes: Axes, values: Sequence[int]) -> None:
    """A logarithmic axis below that names these values alone."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.xaxis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True)
class Tuned:
    """SAEs of one kind, a seed each, at the learning rate of the lowest FVU."""

    saes: list[dict[str, Any]]
    rate: float
    is_inside: bool
    """False where the rate is the smallest or largest tried: a better one may lie beyond."""


def tuned(saes: Iterable[dict[str, Any]]) -> Tuned:
    """Choose the learning rate by the FVU over validation rows, mean over layers and seeds."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for sae in saes:
        by_rate.setdefault(sae["lr"], []).append(sae)
    known = {
        rate: mean(sae["fvu"] for sae in of)
        for rate, of in by_rate.items()
        if all(sae.get("fvu") is not None for sae in of)
    }
    best = min(known, key=known.__getitem__)
    return Tuned(by_rate[best], best, min(by_rate) < best < max(by_rate))


def best_of_sweep(content: dict[str, Any]) -> dict[tuple[int, int], Tuned]:
    """(latents, k) → the SAE at its best rate."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for sae in content["saes"]:
        groups.setdefault((sae["num_latents"], sae["k"]), []).append(sae)
    return {key: tuned(of) for key, of in sorted(groups.items())}


def _sweep(content: dict[str, Any]) -> Figure:
    """Mean over layers by number of latents, and by layer for the middle one."""
    saes = [sae for of in best_of_sweep(content).values() for sae in of.saes]
    sizes = sorted({sae["num_latents"] for sae in saes})
    figure, panels = _figure(2, 3.2, sharey=True)
    for size, colour, marker in zip(sizes, COLOURS, MARKERS, strict=False):
        of = sorted((sae for sae in saes if sae["num_latents"] == size), key=lambda sae: sae["k"])
        label = f"{size:,} latents"
        fvu = [sae["fvu"] for sae in of]
        panels[0].plot([sae["l0"] for sae in of], fvu, color=colour, marker=marker, label=label)
    middle = sizes[len(sizes) // 2]
    of = sorted((sae for sae in saes if sae["num_latents"] == middle), key=lambda sae: sae["k"])
    for layer, colour in zip(range(len(of[0]["fvu_by_layer"])), _shades(of[0]), strict=True):
        fvu = [sae["fvu_by_layer"][layer] for sae in of]
        panels[1].plot([sae["l0"] for sae in of], fvu, color=colour, marker="o", label=f"{layer}")
    panels[0].set(title="Mean over layers", ylabel="validation FVU", yscale="log")
    panels[1].set_title(f"By layer, {middle:,} latents")
    for axes in panels:
        _values_on(axes, sorted({sae["k"] for sae in saes}))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks([0.05, 0.1, 0.2, 0.5])
        axes.set_xlabel("L0, active latents a row")
        axes.grid(visible=True, which="major")
    shown = [fvu for sae in saes for fvu in (sae["fvu"], *sae["fvu_by_layer"])]
    panels[0].set_ylim(0.9 * min(shown), 1.1 * max(shown))
    panels[0].legend()
    panels[1].legend(title="layer", ncols=2)
    return figure


def _shades(sae: dict[str, Any]) -> list[Any]:
    """A colour a layer, from light to dark."""
    num_layers = len(sae["fvu_by_layer"])
    colours = mpl.colormaps["viridis_r"]
    return [colours(0.12 + 0.85 * i / max(1, num_layers - 1)) for i in range(num_layers)]


Kind = tuple[str, int]
"""`all` or `each`, and latents of one SAE."""


def by_kind(content: dict[str, Any]) -> dict[Kind, dict[int, list[float]]]:
    """Kind → seed → FVU by layer, every SAE at its best rate.

    `each` joins the SAEs of single layers.
    """
    found: dict[Kind, dict[int, list[float]]] = {}
    layers = max((sae["layers"] for sae in content["saes"]), key=len)
    for kind, of in tuned_by_kind(content).items():
        seeds = found.setdefault(kind, {})
        for sae in (sae for one in of for sae in one.saes):
            by_layer = seeds.setdefault(sae["seed"], [0.0] * len(layers))
            for layer, fvu in zip(sae["layers"], sae["fvu_by_layer"], strict=True):
                by_layer[layers.index(layer)] = fvu
    return found


def tuned_by_kind(content: dict[str, Any]) -> dict[Kind, list[Tuned]]:
    """Kind → its SAE, or those of its single layers in their order."""
    layers = max((sae["layers"] for sae in content["saes"]), key=len)
    groups: dict[tuple[Kind, tuple[int, ...]], list[dict[str, Any]]] = {}
    for sae in content["saes"]:
        kind = ("all" if sae["layers"] == layers else "each", sae["num_latents"])
        groups.setdefault((kind, tuple(sae["layers"])), []).append(sae)
    found: dict[Kind, list[Tuned]] = {}
    for (kind, _), of in sorted(groups.items()):
        found.setdefault(kind, []).append(tuned(of))
    return found


def _layers(content: dict[str, Any]) -> Figure:
    """FVU by layer; a dot a seed."""
    figure, (axes,) = _figure(1, 3.3)
    small, large = sorted({sae["num_latents"] for sae in content["saes"]})
    num_layers = large // small
    shown = (
        (("each", small), f"{num_layers} single-layer SAEs of {small:,}", "--"),
        (("all", large), f"one multi-layer SAE of {large:,}", "-"),
        (("each", large), f"{num_layers} single-layer SAEs of {large:,}", ":"),
    )
    found = by_kind(content)
    for (key, label, line), colour in zip(shown, COLOURS, strict=False):
        runs = list(found[key].values())
        layers = range(len(runs[0]))
        means = [mean(run[layer] for run in runs) for layer in layers]
        axes.plot(layers, means, line, color=colour, label=label)
        for run in runs:
            axes.plot(layers, run, "o", color=colour, markersize=3)
    axes.set_xticks(list(layers))
    axes.set(xlabel="layer", ylabel="validation FVU", title="k 16, equal rows, best rates")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _tokens(content: dict[str, Any]) -> Figure:
    """FVU against unique tokens, held out and trained on; a dot a seed."""
    saes = content["saes"]
    sizes = sorted({sae["num_latents"] for sae in saes})
    figure, panels = _figure(len(sizes), 3.2, sharey=True)
    tokens = sorted({sae["unique_tokens"] for sae in saes})
    kinds = (("fvu_by_layer", "held out", "-", 0), ("trained_fvu_by_layer", "trained on", "--", 1))
    for axes, size in zip(panels, sizes, strict=True):
        for key, label, line, at in kinds:
            of = [sae for sae in saes if sae["num_latents"] == size]
            seeds = [[mean(s[key]) for s in of if s["unique_tokens"] == n] for n in tokens]
            means = [mean(each) for each in seeds]
            axes.plot(tokens, means, line, color=COLOURS[at], label=label)
            for n, each in zip(tokens, seeds, strict=True):
                axes.plot([n] * len(each), each, "o", color=COLOURS[at], markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [f"{n / 1000:.0f} k" for n in tokens])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(title=f"{size:,} latents", xlabel="unique tokens, equal steps")
    highest = max(mean(sae[key]) for sae in saes for key, *_ in kinds)
    panels[0].set_ylim(0, 1.08 * highest)
    panels[0].set_ylabel("FVU, mean over layers")
    panels[0].legend()
    return figure


def _mlp(content: dict[str, Any]) -> Figure:
    """By scaling, a column each: FVU, L1 and MSE against L0, a line a layer, at the best rate."""
    saes = content["saes"]
    scales = [scale for scale in ("none", "log", "sqrt", "linear") if of_scale(saes, scale)]
    figure = Figure(figsize=(7.6, 6.6), layout="constrained")
    grid = figure.subplots(3, len(scales), sharex=True, sharey="row", squeeze=False)
    for column, scale in enumerate(scales):
        of = of_scale(saes, scale)
        layers = range(len(of[0]["fvu"]))
        colours = _shades({"fvu_by_layer": of[0]["fvu"]})
        for row, key in enumerate(("fvu", "mse", "l1")):
            axes = grid[row][column]
            for layer in layers:
                points = sorted((sae["l0"][layer], sae[key][layer]) for sae in of)
                axes.plot(*zip(*points, strict=True), "o-", color=colours[layer], label=str(layer))
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(FuncFormatter(_two_or_five))
        grid[0][column].set_title(scale)
        grid[2][column].set_xlabel("L0")
    for row, label in enumerate(("FVU", "MSE, units of x²", "L1, units of x")):
        grid[row][0].set_ylabel(label)
    grid[0][0].legend(title="layer", ncols=2, fontsize=7, title_fontsize=7)
    return figure


def _two_or_five(value: float, _: int) -> str:
    """The value where its first digit is 2 or 5, nothing elsewhere."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def of_scale(saes: Sequence[dict[str, Any]], scale: str) -> list[dict[str, Any]]:
    """For each weight of L1, the SAE of this scaling whose learning rate left the lowest loss."""
    best: dict[float, dict[str, Any]] = {}
    for sae in saes:
        if "diverged" in sae or sae["layer_scale"] != scale:
            continue
        known = best.get(sae["l1_weight"])
        if known is None or loss(sae) < loss(known):
            best[sae["l1_weight"]] = sae
    return [best[weight] for weight in sorted(best)]


def loss(sae: dict[str, Any]) -> float:
    """Objective over validation rows: FVU and weighted penalty, mean over layers."""
    weight: float = sae["l1_weight"]
    return float(mean(sae["fvu"]) + weight * mean(sae["penalty"]))


FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "sweep": _sweep,
    "layers": _layers,
    "tokens": _tokens,
    "mlp": _mlp,
}
