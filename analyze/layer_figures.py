"""The figures of where latents lie in the layers, and of how their directions lie."""

import matplotlib as mpl
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlsae.analyze.style import BLUE, STYLE, THOUSANDS, canvas

_SHOWN_COSINES = 0.0005
"""Cosines are shown as far out as one pair in so many lies on either side."""


@mpl.rc_context(STYLE)
def mean_layer(histograms: pa.Table) -> Figure:
    """Histograms of the latents' mean layers, and of their distance to a whole number."""
    figure, (first, second) = canvas(7.0, 3.0, 2)
    _bars(first, histograms, "layer_mean")
    first.set(title="Mean layer of a latent", xlabel="mean layer", ylabel="living latents")
    first.xaxis.set_major_locator(MaxNLocator(integer=True))
    _bars(second, histograms, "layer_mean_to_whole")
    second.set(
        title="Its distance to a whole number", xlabel="|mean layer − nearest layer|", xlim=(0, 0.5)
    )
    for axes in (first, second):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(THOUSANDS)
    return figure


@mpl.rc_context(STYLE)
def decoder_cosine(histograms: pa.Table) -> Figure:
    """Histogram of the cosine of two latents' decoder directions, over all pairs."""
    figure, axes = canvas(4.5, 3.0)
    _bars(axes, histograms, "decoder_cosine")
    axes.set(
        title="Decoder directions of two latents",
        xlabel="cosine",
        ylabel="pairs of latents",
        xlim=(-1, 1),
    )
    axes.set_yscale("symlog", linthresh=1)
    return figure


def _bars(axes: Axes, histograms: pa.Table, name: str) -> None:
    rows = [row for row in histograms.to_pylist() if row["histogram"] == name]
    low, high, count = (np.array([row[key] for row in rows]) for key in ("low", "high", "count"))
    axes.bar(low, count, high - low, align="edge", color=BLUE, linewidth=0)


@mpl.rc_context(STYLE)
def layer_cosine(layer_cosine: pa.Table) -> Figure:
    """Heat map of pairs of living latents: distance of mean layers, cosine of directions.

    Each column, of one range of distances, is scaled to add up to 1, so that the rarer pairs that
    lie far apart are seen as well.
    """
    figure, axes = canvas(5.0, 3.2)
    axes.grid(visible=False)
    axes.set(
        title="Cosine of directions by distance in layers",
        xlabel="|difference of mean layers|",
        ylabel="decoder cosine",
    )
    if len(layer_cosine) == 0:
        axes.text(0.5, 0.5, "fewer than two living latents", ha="center", transform=axes.transAxes)
        return figure
    low = layer_cosine["distance_low"].to_numpy(), layer_cosine["cosine_low"].to_numpy()
    high = layer_cosine["distance_high"].to_numpy(), layer_cosine["cosine_high"].to_numpy()
    distance, cosine = (np.unique(np.concatenate(ends)) for ends in zip(low, high, strict=True))
    counts = np.zeros((len(cosine) - 1, len(distance) - 1))
    at = np.searchsorted(cosine, low[1]), np.searchsorted(distance, low[0])
    counts[at] = layer_cosine["count"].to_numpy()
    share = np.ma.masked_equal(counts, 0) / counts.sum(axis=0).clip(min=1)
    shown = axes.pcolormesh(distance, cosine, share, cmap="viridis", norm=LogNorm(vmax=1))
    figure.colorbar(shown, ax=axes, label="share of pairs at that distance", pad=0.02)
    marginal = np.cumsum(counts.sum(axis=1)) / counts.sum()
    ends = np.searchsorted(marginal, [_SHOWN_COSINES, 1 - _SHOWN_COSINES])
    axes.set_ylim(cosine[max(0, ends[0] - 2)], cosine[min(len(cosine) - 1, ends[1] + 3)])
    return figure
