"""One style for every figure in an analysis: a paper's column widths, colours for all eyes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from mlsae.base.files import write_durably
from mlsae.base.output.drawing import own_style

Float = npt.NDArray[np.float64]

COLUMN, PAGE = 3.3, 6.75
"""Width in inches of one column in a two-column paper, and of both."""

# Colours of Okabe and Ito, which people with any colour vision tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, GREY = "#56B4E9", "#666666"
SERIES = ((BLUE, "o-"), (ORANGE, "s--"), (GREEN, "^:"), (PURPLE, "D-."), (SKY, "v-"), (GREY, "P--"))
"""Colour, marker and line for each series in a panel, distinct in grey as well."""

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 2.2,
    "figure.dpi": 200,
    "savefig.dpi": 200,
    # Text stays text, and equal figures have equal bytes.
    "svg.fonttype": "none",
    "svg.hashsalt": "mlsae",
    "pdf.fonttype": 42,
}
THOUSANDS = StrMethodFormatter("{x:,.0f}")
FORMATS = ("png", "svg")
"""Files of each figure."""
COLOURS = "viridis"
"""Colour map for every heat map, whose lightness grows with the value."""

MAX_BINS = 50


class ShownFigure(Figure):
    """A figure that a notebook shows at the end of a cell, with `%matplotlib inline` or without."""

    def _repr_png_(self) -> bytes:
        return _drawn(self, "png")


def canvas(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """An empty figure, `width` by `height` inches, and its axes: one, or an array of them."""
    figure = ShownFigure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def save(figure: Figure, directory: Path, name: str) -> list[str]:
    """Write a figure as PNG and SVG, equal bytes for equal figures, and return the file names."""
    files = [f"{name}.{form}" for form in FORMATS]
    # One layout serves both files; without an engine each is drawn once, not twice.
    with own_style(STYLE), _any_script():
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
            figure.set_layout_engine(None)
    for form, file in zip(FORMATS, files, strict=True):
        write_durably(directory / file, _drawn(figure, form))
    return files


def _drawn(figure: Figure, form: str) -> bytes:
    """The bytes of a file in one of `FORMATS`, without a date."""
    into = BytesIO()
    with own_style(STYLE), _any_script():
        figure.savefig(into, format=form, metadata={"Date": None} if form == "svg" else None)
    return into.getvalue()


@contextmanager
def _any_script() -> Iterator[None]:
    """Draw letters that the font lacks as boxes, as in prompts; in an SVG their text stays text."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        yield


def values(table: pa.Table, column: str) -> Float:
    """A column as float64, NaN where it is null."""
    return np.asarray(table[column].to_numpy(), dtype=np.float64)


def known(table: pa.Table, column: str) -> Float:
    """A column's values that are not null, as float64."""
    return np.asarray(table[column].drop_null().to_numpy(), dtype=np.float64)


def stairs(axes: Axes, counts: Any, edges: Any, color: str = BLUE, **options: Any) -> None:
    """Draw a histogram from given counts, filled by default."""
    axes.stairs(counts, edges, **{"fill": True, "color": color, **options})


def histogram(axes: Axes, found: Float, low: float, high: float, **options: Any) -> None:
    """Draw a histogram of values between two ends, or further out where a value lies there.

    There are more bins for more values.
    """
    num_bins = int(np.clip(10 + len(found) // 20, 10, MAX_BINS))
    low, high = min(low, float(found.min())), max(high, float(found.max()))
    stairs(axes, *np.histogram(found, num_bins, (low, high if high > low else low + 1)), **options)


def mark(axes: Axes, at: float, label: str, linestyle: str = "--") -> None:
    """Draw a vertical line over the axes' height."""
    top = axes.get_ylim()[1]
    axes.plot([at, at], [0, top], color="black", linestyle=linestyle, linewidth=1, label=label)
    axes.set_ylim(0, top)


def mark_mean(axes: Axes, found: Float, what: str = "mean") -> None:
    """Draw a line at the mean of values, with the mean in the legend."""
    mark(axes, found.mean(), f"{what} {found.mean():#.3g}")


def count_axis(axes: Axes, label: str) -> None:
    """Label the vertical axis with whole numbers and thousands separators."""
    axes.set_ylabel(label)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter(THOUSANDS)


def legend(axes: Axes, columns: int = 1) -> None:
    """Put a legend above the drawing, never over it, in axes with a linear scale."""
    _, labels = axes.get_legend_handles_labels()
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= high])
    axes.set_ylim(low, high + (high - low) * (0.04 + 0.12 * -(-len(labels) // columns)))
    axes.legend(
        loc="upper left",
        ncols=columns,
        columnspacing=1,
        borderaxespad=0.1,
        labelspacing=0.2,
        # The frame hides the grid.
        frameon=True,
        framealpha=1,
        edgecolor="none",
    )


def nothing(axes: Axes, why: str) -> None:
    """Write into an empty panel why it is empty."""
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
    axes.grid(visible=False)


def layer_ticks(axis: Any, layers: npt.NDArray[Any], at: npt.NDArray[Any] | None = None) -> None:
    """Label an axis with about a dozen layer ids, at their values or side by side."""
    step = max(1, -(-len(layers) // 12))
    places = np.arange(len(layers)) if at is None else at
    axis.set_ticks(places[::step], [str(layer) for layer in layers[::step]])
