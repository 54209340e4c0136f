"""Figures about decoder directions: cosines with each other and with embeddings."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mlsae.analyze.results.figures.latents import bars
from mlsae.analyze.results.figures.style import (
    BLUE,
    COLOURS,
    COLUMN,
    ORANGE,
    PAGE,
    canvas,
    count_axis,
    histogram,
    known,
    legend,
    mark,
    nothing,
)

_HEIGHT = 2.3


def decoder_cosine(histograms: pa.Table, latents: pa.Table, summary: Mapping[str, Any]) -> Figure:
    """Cosines between latents' decoder directions: all pairs, and each latent's largest."""
    figure, (first, second) = canvas(PAGE, _HEIGHT, 2)
    bars(first, histograms, "decoder_cosine")
    first.set(title="Decoder directions of two latents", xlabel="cosine", ylabel="pairs of latents")
    first.set_yscale("symlog", linthresh=1)
    first.set_xlim(-1, 1)
    first.set_xticks([-1, -0.5, 0, 0.5, 1])
    second.set(title="The largest of each latent", xlabel="largest cosine with another latent")
    count_axis(second, "latents")
    largest = known(latents, "decoder_cosine")
    if len(largest) == 0:
        nothing(second, "there is no other latent")
        return figure
    histogram(second, largest, min(0.0, float(largest.min())), 1)
    mmcs = summary["decoder"]["mmcs"]
    mark(second, mmcs, f"mean (MMCS) {mmcs:#.3g}")
    legend(second)
    return figure


def embedding_cosine(latents: pa.Table) -> Figure:
    """Each decoder direction's largest cosine with a row of W_E, and with a row of W_U."""
    figure, axes = canvas(COLUMN, _HEIGHT)
    axes.set(title="Directions beside embeddings", xlabel="largest cosine with a row")
    count_axis(axes, "latents")
    for name, what, options in (
        ("embedding", "W_E", {"color": BLUE, "alpha": 0.75}),
        ("unembedding", "W_U", {"color": ORANGE, "fill": False, "linewidth": 1.2}),
    ):
        found = known(latents, f"{name}_cosine")
        if len(found):
            label = f"{name} {what} (mean {found.mean():#.3g})"
            low = min(0.0, float(found.min()))
            histogram(axes, found, low, 1, label=label, **options)
    legend(axes)
    return figure


def layer_cosine(layer_cosine: pa.Table) -> Figure:
    """Heat map of pairs of living latents: distance between mean layers, cosine of directions.

    Each column, a range of distances, is scaled to sum to 1, so that pairs far apart, which are
    rarer, show as well.
    """
    figure, axes = canvas(COLUMN, 2.5)
    axes.grid(visible=False)
    axes.set(
        title="Cosine of directions by distance",
        xlabel="|difference of mean layers| (layers)",
        ylabel="decoder cosine",
    )
    if len(layer_cosine) == 0:
        nothing(axes, "fewer than two living latents")
        return figure
    low = layer_cosine["distance_low"].to_numpy(), layer_cosine["cosine_low"].to_numpy()
    high = layer_cosine["distance_high"].to_numpy(), layer_cosine["cosine_high"].to_numpy()
    distance, cosine = (np.unique(np.concatenate(ends)) for ends in zip(low, high, strict=True))
    counts = np.zeros((len(cosine) - 1, len(distance) - 1))
    at = np.searchsorted(cosine, low[1]), np.searchsorted(distance, low[0])
    counts[at] = layer_cosine["count"].to_numpy()
    share = np.ma.masked_equal(counts, 0) / counts.sum(axis=0).clip(min=1)
    shown = axes.pcolormesh(
        distance, cosine, share, cmap=COLOURS, norm=LogNorm(vmax=1), rasterized=True
    )
    figure.colorbar(shown, ax=axes, label="share of pairs at that distance", pad=0.02)
    axes.set_ylim(cosine[0], cosine[-1])
    return figure
