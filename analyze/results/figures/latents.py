"""Histograms over latents: layers, density, token ids."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlsae.analyze.results.figures.style import (
    COLOURS,
    COLUMN,
    MAX_BINS,
    ORANGE,
    PAGE,
    SERIES,
    Float,
    canvas,
    count_axis,
    histogram,
    known,
    legend,
    mark,
    mark_mean,
    nothing,
    stairs,
)
from mlsae.base.units import counted

_HEIGHT = 2.3
_FEW = 10
"""Counts up to which a colour scale is linear."""

_DEAD = "every latent is dead"


def mean_layer(histograms: pa.Table) -> Figure:
    """Histograms of latents' mean layers, and their distance to a whole number."""
    figure, (first, second) = canvas(PAGE, _HEIGHT, 2)
    bars(first, histograms, "layer_mean")
    first.set(title="Mean layer of a latent", xlabel="mean layer")
    # One layer alone gets a bar of the same width.
    low, high = first.dataLim.intervalx
    first.set_xlim(low - 0.4, high + 0.4)
    first.xaxis.set_major_locator(MaxNLocator(integer=True))
    bars(second, histograms, "layer_mean_to_whole")
    second.set(title="Distance to a whole number", xlim=(0, 0.5))
    second.set_xlabel("|mean layer − nearest layer| (layers)")
    for axes in (first, second):
        count_axis(axes, "living latents")
    return figure


def bars(axes: Axes, histograms: pa.Table, name: str) -> None:
    """Draw one histogram from the table."""
    mine = histograms.filter(pc.field("histogram") == name)
    edges = np.append(mine["low"].to_numpy(), mine["high"].to_numpy()[-1:])
    stairs(axes, mine["count"].to_numpy(), edges)


def layer_std(latents: pa.Table) -> Figure:
    """A latent's standard deviation over layers: over all tokens, and at a single one."""
    figure, (first, second) = canvas(PAGE, 2.5, 2)
    stds = known(latents, "layer_std"), known(latents, "layer_std_by_count")
    _both_ways(first, latents, "layer_std", float(np.concatenate(stds).max(initial=0)))
    first.set(title="Spread of a latent over layers", xlabel="standard deviation (layers)")
    both = latents.filter(pc.field("layer_std").is_valid() & pc.field("layer_var_token").is_valid())
    second.set(
        title="At a single token, against all",
        xlabel="over all tokens (layers)",
        ylabel="at a single token (layers)",
    )
    if len(both) == 0:
        nothing(second, _DEAD)
        return figure
    over, at_one = known(both, "layer_std"), np.sqrt(known(both, "layer_var_token"))
    most = max(over.max(), at_one.max()) or 1.0
    edges = np.linspace(0, most, MAX_BINS + 1)
    counts = np.histogram2d(at_one, over, [edges, edges])[0]
    most_there = counts.max()
    shown = second.pcolormesh(
        edges,
        edges,
        np.ma.masked_equal(counts, 0),
        cmap=COLOURS,
        norm=LogNorm(1, most_there) if most_there > _FEW else Normalize(0, most_there),
        rasterized=True,
    )
    second.plot([0, most], [0, most], color="black", linestyle="--", linewidth=0.8)
    ticks = None if most_there > _FEW else MaxNLocator(integer=True)
    figure.colorbar(shown, ax=second, label="latents", pad=0.02, ticks=ticks)
    return figure


def layer_entropy(latents: pa.Table, latent_layers: pa.Table) -> Figure:
    """Entropy of P(layer | latent)."""
    figure, axes = canvas(COLUMN, _HEIGHT)
    num_layers = len(pc.unique(latent_layers["layer"]))
    _both_ways(axes, latents, "layer_entropy", float(np.log(num_layers)))
    axes.set(
        title="Entropy of a latent's layer",
        xlabel=f"nats (at most ln {num_layers} = {np.log(num_layers):.3g})",
    )
    return figure


def bimodality(latents: pa.Table) -> Figure:
    """Bimodality (skewness² + 1) / kurtosis of P(layer | latent), for latents at several layers."""
    figure, axes = canvas(COLUMN, _HEIGHT)
    _both_ways(axes, latents, "layer_bimodality", 1.0, "no latent has two layers")
    axes.set(title="Bimodality of a latent's layer", xlabel="(skewness² + 1) / kurtosis")
    return figure


def num_layers(latent_layers: pa.Table) -> Figure:
    """Layers at which a latent is active for at least 1, 10, 100, … rows."""
    figure, axes = canvas(COLUMN, _HEIGHT)
    of_layers = len(pc.unique(latent_layers["layer"]))
    counts = latent_layers["count"].to_numpy().reshape(-1, of_layers)
    alive = counts[counts.sum(axis=1) > 0]
    axes.set(title="Layers of a latent, by least number of rows", xlabel="layers at which active")
    axes.set_ylabel("share of living latents")
    if len(alive) == 0:
        nothing(axes, _DEAD)
        return figure
    for n, (color, form) in enumerate(SERIES):
        if (alive >= 10**n).any():
            at = np.bincount((alive >= 10**n).sum(axis=1), minlength=of_layers + 1) / len(alive)
            axes.plot(np.arange(of_layers + 1), at, form, color=color, label=f"≥ {10**n:,}")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes, 3)
    return figure


def density(latents: pa.Table) -> Figure:
    """Histogram of living latents' log10 density."""
    alive = latents.filter(pc.invert(latents["dead"]))["density"].to_numpy()
    dead = len(latents) - len(alive)
    figure, axes = canvas(COLUMN, _HEIGHT)
    axes.set(
        title=f"{counted(len(alive), 'living latent')}, {dead:,} dead",
        xlabel="log₁₀ density (share of rows at which active)",
    )
    count_axis(axes, "living latents")
    if len(alive) == 0:
        nothing(axes, _DEAD)
        return figure
    logs = np.log10(alive)
    histogram(axes, logs, float(np.floor(logs.min())), float(np.ceil(logs.max())))
    return figure


def token_entropy(latents: pa.Table) -> Figure:
    """Entropy over token ids in each latent's events."""
    found = known(latents, "token_entropy")
    figure, axes = canvas(COLUMN, _HEIGHT)
    axes.set(title="Entropy of a latent's token ids", xlabel="nats (0: one token id)")
    count_axis(axes, "latents")
    if len(found) == 0:
        nothing(axes, _DEAD)
        return figure
    histogram(axes, found, 0, float(np.ceil(found.max())))
    mark_mean(axes, found)
    legend(axes)
    return figure


def _both_ways(
    axes: Axes, latents: pa.Table, column: str, high: float, if_none: str = _DEAD
) -> None:
    """Histograms for a column about P(layer | latent), by totals and by counts."""
    count_axis(axes, "living latents")
    found: list[Float] = [known(latents, name) for name in (column, f"{column}_by_count")]
    if len(found[0]) == 0:
        nothing(axes, if_none)
        return
    # A sum that rounding puts above the largest value belongs to the last bin.
    high = max(high, *(float(of.max()) for of in found))
    by_total, by_count = found
    histogram(axes, by_total, 0, high, label="by total", alpha=0.75)
    histogram(axes, by_count, 0, high, color=ORANGE, fill=False, label="by count", linewidth=1.2)
    mark_mean(axes, found[0], "mean by total")
    if column == "layer_bimodality":
        mark(axes, 5 / 9, "uniform: 5/9", ":")
    legend(axes, 2)
