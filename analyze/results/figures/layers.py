"""Figures from the table `layers`, with a point a layer."""

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlsae.analyze.results.figures.style import (
    GREY,
    PAGE,
    SERIES,
    canvas,
    layer_ticks,
    legend,
    values,
)

_HEIGHT = 2.3
_LARGE_RANGE = 20.0


def reconstruction(layers: pa.Table) -> Figure:
    """Fraction of variance unexplained, and cosine and bias of reconstructions."""
    figure, (first, second) = canvas(PAGE, _HEIGHT, 2)
    _lines(first, layers, {"fvu": "about channel means", "fvu_published": "one mean, as published"})
    first.set(title="Variance unexplained", ylabel="FVU")
    _lines(
        second,
        layers,
        {"cosine": "cosine of x and x̂", "relative_reconstruction_bias": "relative bias of x̂"},
    )
    second.axhline(1, color=GREY, linewidth=0.8, zorder=1)
    second.set(title="Reconstructions x̂ of activations x", ylabel="cosine, bias (1: perfect)")
    _finish(first, zero=True)
    _finish(second)
    return figure


def sparsity(layers: pa.Table) -> Figure:
    """Active latents a row, and shares of latents that are active at no row or at many."""
    figure, (first, second) = canvas(PAGE, _HEIGHT, 2)
    _lines(first, layers, {"l0": None})
    first.set(title="Active latents of a row", ylabel="L0 (latents)")
    _finish(first, zero=True)
    # Without an active latent the density is 0, whatever the number of latents.
    active = values(layers, "density") > 0
    if active.any():
        num_latents = float((values(layers, "l0") / values(layers, "density"))[active][0])
        right = first.secondary_yaxis(
            "right",
            functions=(lambda l0: 100 * l0 / num_latents, lambda part: part * num_latents / 100),
        )
        right.set_ylabel("density (% of latents)")
    _lines(
        second,
        layers,
        {
            "dead_fraction": "at no row (dead at the layer)",
            "frequent_fraction": "at over a tenth of the rows",
            "always_on_fraction": "at every row",
        },
    )
    second.set(title="Latents that are active", ylabel="share of latents")
    _finish(second, zero=True)
    return figure


def cross_entropy(layers: pa.Table) -> Figure:
    """Cost to the transformer when one layer's reconstructions replace its activations."""
    figure, (first, second) = canvas(PAGE, _HEIGHT, 2)
    _lines(first, layers, {"delta_ce": "cross-entropy added", "kl": "KL(untouched ‖ spliced)"})
    if layers["ce_store"].null_count == 0:
        stored = values(layers, "ce_store") - values(layers, "ce")
        color, form = SERIES[2]
        first.plot(values(layers, "layer"), stored, form, color=color, label="added by the store")
    first.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    first.set(title="Cost of one layer's reconstructions", ylabel="nats / token")
    _lines(
        second,
        layers,
        {
            "loss_recovered_zero": "loss recovered, zero ablation",
            "loss_recovered_mean": "loss recovered, mean ablation",
            "top1_agreement": "top-1 agreement",
        },
    )
    second.axhline(1, color=GREY, linewidth=0.8, zorder=1)
    second.set(title="What remains", ylabel="share")
    _finish(first)
    _finish(second)
    return figure


def norm_cosine(layers: pa.Table) -> Figure:
    """Activations' mean L2 norm, and a layer's cosine with the next."""
    figure, (first, second) = canvas(PAGE, _HEIGHT, 2)
    _lines(first, layers, {"norm": None})
    first.set(title="Mean L2 norm of activations", ylabel="‖x‖ (activation)")
    norm = values(layers, "norm")
    if norm.min() > 0 and norm.max() / norm.min() > _LARGE_RANGE:
        first.set_yscale("log")
        _finish(first)
    else:
        _finish(first, zero=True)
    cosines: dict[str, str | None] = {
        "adjacent_cosine": "mean over rows",
        "adjacent_cosine_pooled": "pooled over rows",
    }
    _lines(second, layers, cosines)
    second.set(title="Likeness to the next layer", ylabel="centred cosine")
    least = min(float(np.nanmin(values(layers, name), initial=0.0)) for name in cosines)
    second.set_ylim(min(0.0, least * 1.1), 1.05)
    _finish(second)
    second.set_xlim(first.get_xlim())
    return figure


def _lines(axes: Axes, layers: pa.Table, columns: dict[str, str | None]) -> None:
    """A line for each column, with the 95% interval at each layer where the table has one."""
    ids = values(layers, "layer")
    for (column, label), (color, form) in zip(columns.items(), SERIES, strict=False):
        axes.plot(ids, values(layers, column), form, color=color, label=label)
        if f"{column}_low" in layers.column_names:
            low, high = (values(layers, f"{column}_{end}") for end in ("low", "high"))
            axes.vlines(ids, low, high, color=color, linewidth=2.5, alpha=0.4)
    axes.set_xlabel("layer")
    layer_ticks(axes.xaxis, layers["layer"].to_numpy(), at=ids)


def _finish(axes: Axes, *, zero: bool = False) -> None:
    """Start the axis at 0 where asked, and add a legend for series with labels."""
    if zero:
        axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[1]:
        legend(axes)
