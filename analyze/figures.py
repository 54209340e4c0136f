"""The figures of an analysis, each a function of its tables, in one style."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from mlsae.analyze import layer_figures
from mlsae.analyze.style import BLUE, GREY, ORANGE, STYLE, THOUSANDS, canvas

_MAX_COLUMNS = 1200
_LARGE_RANGE = 20.0


@mpl.rc_context(STYLE)
def layer_distribution(latents: pa.Table, latent_layers: pa.Table) -> Figure:
    """Heat map of P(layer | latent), living latents from left to right by mean layer.

    Over 1,200 latents, neighbours are averaged into one column. Colours follow the square root, so
    that latents spread over many layers do not drown.
    """
    layers = pc.unique(latent_layers["layer"]).to_numpy()
    probs = latent_layers["prob"].to_numpy().reshape(-1, len(layers))
    mean = latents["layer_mean"].to_numpy()
    order = np.argsort(mean, kind="stable")[: int(np.isfinite(mean).sum())]
    figure, axes = canvas(7.0, 3.2)
    axes.grid(visible=False)
    axes.set(xlabel="latent, by mean layer", ylabel="layer")
    if len(order) == 0:
        axes.set_title("P(layer | latent): every latent is dead")
        return figure
    bins = np.array_split(np.arange(len(order)), min(len(order), _MAX_COLUMNS))
    image = np.stack([probs[order[b]].mean(axis=0) for b in bins], axis=1)
    shown = axes.imshow(
        image,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="viridis",
        norm=PowerNorm(0.5, vmin=0, vmax=1),
        extent=(0, len(order), -0.5, len(layers) - 0.5),
    )
    height = np.interp(mean[order], layers, np.arange(len(layers)))
    (line,) = axes.plot(np.arange(len(order)) + 0.5, height, color="white", linewidth=1.2)
    line.set_path_effects([withStroke(linewidth=2.2, foreground="black")])
    axes.xaxis.set_major_formatter(THOUSANDS)
    _layer_ticks(axes.yaxis, layers)
    figure.colorbar(shown, ax=axes, label="P(layer | latent)", pad=0.02)
    dead = len(mean) - len(order)
    axes.set_title(
        f"Layers at which each of {len(order):,} latents is active"
        + (f" ({dead:,} dead left out)" if dead else "")
        + "; white: mean layer"
    )
    return figure


@mpl.rc_context(STYLE)
def fvu_delta_ce(layers: pa.Table) -> Figure:
    """Fraction of variance unexplained, and added cross-entropy where it was measured."""
    ids = layers["layer"].to_numpy()
    measured = layers["delta_ce"].null_count == 0
    panels = 2 if measured else 1
    figure, axes = canvas(3.5 * panels, 3.0, panels)
    first = axes[0] if measured else axes
    first.plot(ids, _values(layers, "fvu"), "o-", color=BLUE, label="channel means")
    first.plot(
        ids, _values(layers, "fvu_published"), "s--", color=ORANGE, label="one mean, as published"
    )
    first.set(title="Variance unexplained", xlabel="layer", ylabel="FVU")
    first.set_ylim(bottom=0)
    first.legend()
    _layer_ticks(first.xaxis, ids, at=ids)
    if measured:
        second = axes[1]
        second.plot(ids, _values(layers, "delta_ce"), "o-", color=BLUE, label="SAE")
        if layers["ce_store"].null_count == 0:
            stored = _values(layers, "ce_store") - _values(layers, "ce")
            second.plot(ids, stored, "s--", color=ORANGE, label="stored activations")
        second.set(title="Cross-entropy added by one layer", xlabel="layer", ylabel="nats / token")
        second.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        second.legend()
        _layer_ticks(second.xaxis, ids, at=ids)
    return figure


@mpl.rc_context(STYLE)
def norm_cosine(layers: pa.Table) -> Figure:
    """Mean L2 norm of the activations, and how alike a layer is to the next."""
    ids = layers["layer"].to_numpy()
    figure, (first, second) = canvas(7.0, 3.0, 2)
    norm = _values(layers, "norm")
    first.plot(ids, norm, "o-", color=BLUE)
    first.set(title="Mean L2 norm", xlabel="layer", ylabel="‖x‖")
    if norm.min() > 0 and norm.max() / norm.min() > _LARGE_RANGE:
        first.set_yscale("log")
    else:
        first.set_ylim(bottom=0)
    cosine = _values(layers, "adjacent_cosine")
    second.plot(ids, cosine, "o-", color=BLUE)
    second.set(title="Centred cosine with the next layer", xlabel="layer", ylabel="pooled cosine")
    second.set_ylim(min(0.0, float(np.nanmin(cosine, initial=0.0)) * 1.1), 1.05)
    for axes in (first, second):
        _layer_ticks(axes.xaxis, ids, at=ids)
    second.set_xlim(first.get_xlim())
    return figure


@mpl.rc_context(STYLE)
def density(latents: pa.Table) -> Figure:
    """Histogram of the log10 density of the living latents."""
    alive = latents.filter(pc.invert(latents["dead"]))["density"].to_numpy()
    dead = len(latents) - len(alive)
    figure, axes = canvas(4.5, 3.0)
    axes.hist(np.log10(alive), bins=min(50, 10 + len(alive) // 20), color=BLUE)
    axes.set(
        title=f"{len(alive):,} living latents, {dead:,} dead",
        xlabel="log₁₀ density (share of rows at which active)",
        ylabel="number of latents",
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(THOUSANDS)
    return figure


@mpl.rc_context(STYLE)
def draw_all(
    directory: Path,
    *,
    layers: pa.Table,
    latents: pa.Table,
    latent_layers: pa.Table,
    histograms: pa.Table,
    layer_cosine: pa.Table,
) -> list[str]:
    """Draw every figure into `directory` as PNG; their file names."""
    drawn = {
        "layer_distribution.png": layer_distribution(latents, latent_layers),
        "fvu_delta_ce.png": fvu_delta_ce(layers),
        "norm_cosine.png": norm_cosine(layers),
        "density.png": density(latents),
        "mean_layer.png": layer_figures.mean_layer(histograms),
        "decoder_cosine.png": layer_figures.decoder_cosine(histograms),
        "layer_cosine.png": layer_figures.layer_cosine(layer_cosine),
    }
    for name, figure in drawn.items():
        figure.savefig(directory / name)
    return list(drawn)


def _values(table: pa.Table, column: str) -> npt.NDArray[np.float64]:
    return np.asarray(table[column].to_numpy(), dtype=np.float64)


def _layer_ticks(axis: Any, layers: npt.NDArray[Any], at: npt.NDArray[Any] | None = None) -> None:
    """Whole layer ids, at most about a dozen of them."""
    step = max(1, -(-len(layers) // 12))
    places = np.arange(len(layers)) if at is None else at
    axis.set_ticks(places[::step], [str(layer) for layer in layers[::step]])
