"""The figure of the variance of the layer, with the share at single tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlsae.analyze.results.figures.style import BLUE, GREEN, GREY, ORANGE, PAGE, canvas

_SCHEMES = {"mass": "mass", "pair_uniform": "pair-uniform", "as_coded": "as coded"}
_TERMS = {
    "single": (BLUE, "single tokens: E Var(L | J, T)"),
    "tokens": (ORANGE, "between tokens: E Var E(L | J, T)"),
    "latents": (GREEN, "between latents: Var E(L | J)"),
}


def layer_variance(summary: Mapping[str, Any]) -> Figure:
    """The terms of the variance of the layer, and the share at a single token within latents."""
    found = summary["layer_variance"]
    figure, (first, second) = canvas(PAGE, 2.1, 2)
    _terms(first, found)
    second.set(
        title="Share at a single token, within latents",
        xlabel="E Var(L | J, T) / E Var(L | J)",
        xlim=(0, 1.18),
    )
    ratios = [found[scheme]["single_over_aggregate"] for scheme in _SCHEMES]
    second.barh(range(len(ratios)), [ratio or 0 for ratio in ratios], color=BLUE, height=0.6)
    for place, ratio in enumerate(ratios):
        text = "not defined" if ratio is None else f"{ratio:.3g}"
        second.text((ratio or 0) + 0.02, place, text, va="center")
    second.set_xticks(np.linspace(0, 1, 6))
    _names(second, list(_SCHEMES.values()))
    return figure


def _terms(axes: Axes, found: Mapping[str, Any]) -> None:
    axes.set(title="Variance of the layer L", xlabel="share of Var(L)", xlim=(0, 1))
    names = []
    ends = np.zeros(2)
    for place, scheme in enumerate(("mass", "pair_uniform")):
        names.append(f"{_SCHEMES[scheme]}\n{found[scheme]['total']:.3g} layer²")
        if found[scheme]["total"] == 0:
            axes.text(0.5, place, "all at one layer", ha="center", va="center", color=GREY)
    totals = np.array([found[scheme]["total"] for scheme in ("mass", "pair_uniform")])
    for term, (color, label) in _TERMS.items():
        parts = np.array([found[scheme][term] for scheme in ("mass", "pair_uniform")])
        shares = np.divide(parts, totals, out=np.zeros(2), where=totals > 0)
        axes.barh([0, 1], shares, left=ends, color=color, height=0.5, label=label)
        ends += shares
    _names(axes, names)
    axes.set_ylim(1.45, -1.6)
    axes.legend(loc="upper left", borderaxespad=0.1, labelspacing=0.2, handlelength=1)


def _names(axes: Axes, names: list[str]) -> None:
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylabel("definition of P")
    axes.invert_yaxis()
