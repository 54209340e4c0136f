"""Heat maps of P(layer | latent): over the data set, and of a prompt."""

import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from mlsae.analyze.results.distribution import layer_distribution as distribution
from mlsae.analyze.results.figures.style import (
    COLOURS,
    PAGE,
    THOUSANDS,
    Float,
    canvas,
    layer_ticks,
    nothing,
)
from mlsae.base.units import counted

_MAX_COLUMNS = 1200
_NAMED = 24
"""Most latents that are named on the axis."""

_LEAST = 1e-3
"""Least largest value of a latent that is shown for a prompt, as in the published figures."""

_SHOWN_TEXT = 60
"""Characters of a prompt that fit in a title; wide ones, such as Chinese, count twice."""


def layer_distribution(latents: pa.Table, latent_layers: pa.Table) -> Figure:
    """Heat map of P(layer | latent) by totals, living latents from left to right by mean layer.

    Beyond 1,200 latents, neighbours are averaged into one column. Colours follow the square root,
    which keeps latents visible that are spread over many layers.
    """
    return _of_all(latents, latent_layers, "", "by total of values")


def layer_distribution_by_count(latents: pa.Table, latent_layers: pa.Table) -> Figure:
    """Heat map of P(layer | latent) by counts of events, as `layer_distribution` for totals."""
    return _of_all(latents, latent_layers, "_by_count", "by count of activations")


def prompt(
    prompts: pa.Table, layers: pa.Table, summary: Mapping[str, Any], *, number: int
) -> Figure:
    """Heat map of P(layer | latent) over one prompt's eligible tokens, latents by mean layer.

    P is by totals. Latents whose largest value in the prompt is below 0.001 are left out.

    Args:
        prompts: the table `prompts`.
        layers: the table `layers`, for the ids of layers.
        summary: the summary, for the texts of prompts.
        number: number of the prompt, from 0.
    """
    ids = layers["layer"].to_numpy()
    mine = prompts.filter((pc.field("prompt") == number) & pc.field("eligible"))
    latents, slots = np.unique(mine["latent"].to_numpy(), return_inverse=True)
    totals, largest = np.zeros((len(ids), len(latents))), np.zeros(len(latents))
    found = mine["value"].to_numpy()
    np.add.at(totals, (np.searchsorted(ids, mine["layer"].to_numpy()), slots), found)
    np.maximum.at(largest, slots, found)
    kept = largest >= _LEAST
    of = distribution(totals[:, kept], tuple(ids.tolist()))
    figure = _heat_map(of.probs, of.mean, ids, latents[kept], "no latent is active")
    axes, weak = figure.axes[0], int((~kept).sum())
    axes.set_title(
        f"{counted(int(kept.sum()), 'latent')} of “{_shortened(summary['prompts'][number])}”",
        parse_math=False,
    )
    if weak:
        axes.set_xlabel(f"{axes.get_xlabel()}; {weak:,} with values below {_LEAST:g} left out")
    return figure


def _of_all(latents: pa.Table, latent_layers: pa.Table, by: str, what: str) -> Figure:
    ids = pc.unique(latent_layers["layer"]).to_numpy()
    probs = latent_layers[f"prob{by}"].to_numpy().reshape(-1, len(ids)).T
    mean = latents[f"layer_mean{by}"].to_numpy()
    alive = np.isfinite(mean)
    figure = _heat_map(
        probs[:, alive],
        mean[alive],
        ids,
        latents["latent"].to_numpy()[alive],
        "every latent is dead",
    )
    dead = len(mean) - int(alive.sum())
    figure.axes[0].set_title(
        f"Layers of {counted(int(alive.sum()), 'latent')}, {what}"
        + (f" ({dead:,} dead left out)" if dead else "")
    )
    return figure


def _heat_map(
    probs_LM: Float,
    mean_M: Float,
    ids: npt.NDArray[Any],
    names_M: npt.NDArray[Any],
    if_none: str,
) -> Figure:
    order = np.argsort(mean_M, kind="stable")
    figure, axes = canvas(PAGE, 2.4)
    axes.grid(visible=False)
    axes.set_ylabel("layer")
    if len(order) == 0:
        axes.set_xlabel("latent, by mean layer")
        axes.set_yticks([])
        axes.set_xticks([])
        nothing(axes, if_none)
        return figure
    # Columns are equally wide, so their numbers of latents differ by one at most.
    num_columns = min(len(order), _MAX_COLUMNS)
    starts = np.arange(num_columns + 1) * len(order) // num_columns
    image = np.add.reduceat(probs_LM[:, order], starts[:-1], axis=1) / np.diff(starts)
    shown = axes.imshow(
        image,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=COLOURS,
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        extent=(0, len(order), -0.5, len(ids) - 0.5),
        rasterized=True,
    )
    height = np.interp(mean_M[order], ids, np.arange(len(ids)))
    middles = (starts[:-1] + starts[1:]) / 2
    lines = np.add.reduceat(height, starts[:-1]) / np.diff(starts)
    (line,) = axes.plot(middles, lines, color="white", linewidth=1, label="mean")
    line.set_path_effects([withStroke(linewidth=2, foreground="black")])
    if len(order) <= _NAMED:
        axes.set_xticks(np.arange(len(order)) + 0.5, [str(name) for name in names_M[order]])
        axes.set_xlabel("index of the latent, latents by mean layer (line)")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(THOUSANDS)
        axes.set_xlabel("latent, by mean layer (line)")
    layer_ticks(axes.yaxis, ids)
    bar = figure.colorbar(shown, ax=axes, label="P(layer | latent)", pad=0.015, aspect=15)
    bar.set_ticks([0, 0.05, 0.25, 0.5, 0.75, 1], labels=["0", "0.05", "0.25", "0.5", "0.75", "1"])
    return figure


def _shortened(text: str) -> str:
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    ends = np.cumsum([1 + (unicodedata.east_asian_width(c) in "WF") for c in plain])
    fit = int(np.searchsorted(ends, _SHOWN_TEXT, "right"))
    return plain if fit == len(plain) else f"{plain[:fit]}…"
