"""One style for every figure of an analysis."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

# Okabe and Ito's colours, told apart by everyone.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "savefig.dpi": 160,
}
THOUSANDS = StrMethodFormatter("{x:,.0f}")


def canvas(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """An empty figure of so many inches, and its axes: one, or an array of them."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)
