"""log.jsonl, one line for every so many steps, and curves.png drawn from it."""

import json
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mlsae.base.files import write_durably
from mlsae.base.output.drawing import own_style
from mlsae.train.step.trainer import StepResult

LINES = 1000
"""A run logs about so many lines, however long it is."""


class Averages:
    """Sums over the steps since the last line of the log."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}

    def add(self, result: StepResult) -> None:
        """Count a step."""
        seen = {
            "steps": 1,
            "loss": result.loss,
            "aux": result.aux,
            "penalty": result.penalty,
            "active": result.num_active,
            "errors": result.layer_errors.tolist(),
            "rows": result.layer_rows.tolist(),
        }
        if result.nested is not None:
            errors, active = result.nested.tolist()
            seen |= {"nested_errors": errors, "nested_active": active}
        # Sums from an earlier version's checkpoint may lack some, which that line goes without.
        before = self._sums or dict.fromkeys(seen)
        self._sums = {
            name: value if before[name] is None else _plus(before[name], value)
            for name, value in seen.items()
            if name in before
        }
        self._sums["num_dead"] = result.num_dead

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON."""
        return self._sums

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the result of `state`."""
        self._sums = dict(state)

    def take(self) -> dict[str, Any] | None:
        """Means over the steps since the last call; `fvu` is the main term over all rows.

        None where there was no step.
        """
        sums, self._sums = self._sums, {}
        if not sums:
            return None
        total = sum(sums["rows"])
        return {
            "loss": sums["loss"] / sums["steps"],
            "aux": sums["aux"] / sums["steps"],
            "penalty": sums["penalty"] / sums["steps"],
            "fvu": sum(sums["errors"]) / total,
            "fvu_by_layer": [
                e / n if n else None for e, n in zip(sums["errors"], sums["rows"], strict=True)
            ],
            "l0": sums["active"] / total,
            "num_dead": sums["num_dead"],
            **_by_prefix(sums),
        }


def _by_prefix(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Lists by layer for each prefix of the latents; without prefixes only L0 by layer."""
    if "nested_active" not in sums:
        return {}
    fvu, l0 = (
        [
            [n / rows if rows else None for n, rows in zip(of, sums["rows"], strict=True)]
            for of in by
        ]
        for by in (sums["nested_errors"], sums["nested_active"])
    )
    found = {"l0_by_layer": l0[-1]}
    return found if len(l0) == 1 else found | {"fvu_by_prefix": fvu, "l0_by_prefix": l0}


class Log:
    """log.jsonl of a run; a resumed run goes on where its checkpoint was made.

    Args:
        path: the log file.
        step: lines of later steps are taken off.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_log(path) if line["step"] <= step] if path.exists() else []
        write_durably(path, "".join(_line(line) for line in kept).encode())
        self._path = path

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        with self._path.open("a") as file:
            file.write(_line(line))

    def sync(self) -> None:
        """Make all lines durable: a checkpoint that follows has none of them to make again."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a crash cut short is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def draw_curves(
    lines: list[dict[str, Any]],
    layers: tuple[int, ...],
    validation: Sequence[float | None] | None,
    path: Path,
) -> None:
    """Draw FVU by layer, dead latents and learning rate over rows.

    Args:
        lines: lines of a log, at least one.
        layers: layers of the SAE.
        validation: FVU of the held-out rows by layer, in the units of the log; None without any.
        path: PNG file to write.
    """
    drawn = BytesIO()
    with own_style({}):
        _figure(_whole(lines), layers, validation).savefig(drawn, format="png", dpi=120)
    write_durably(path, drawn.getvalue())


def _figure(
    lines: list[dict[str, Any]], layers: tuple[int, ...], validation: Sequence[float | None] | None
) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    figure = Figure(figsize=(7, 7))
    FigureCanvasAgg(figure)
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    rows = [line["rows"] for line in lines]
    colours = _colours(len(layers))
    for i, layer in enumerate(layers):
        fvu = [line["fvu_by_layer"][i] for line in lines]
        above.plot(rows, fvu, color=colours[i], linewidth=1, label=f"layer {layer}")
        if validation is not None and validation[i] is not None:
            above.plot(rows[-1:], validation[i], "o", color=colours[i], markersize=4)
    above.plot(rows, [line["fvu"] for line in lines], "k--", linewidth=1, label="all layers")
    if validation is not None:
        above.plot([], [], "ko", markersize=4, label="held-out rows")
    above.set(ylabel="FVU of the batches", yscale="log")
    for ticks in (above.yaxis.set_major_formatter, above.yaxis.set_minor_formatter):
        ticks(StrMethodFormatter("{x:g}"))
    above.legend(fontsize="small", ncols=2)
    middle.plot(rows, [line["num_dead"] for line in lines], "k-", linewidth=1)
    middle.set(ylabel="dead latents", ylim=(0, max(1, *(line["num_dead"] for line in lines))))
    below.plot(rows, [line["lr"] for line in lines], "k-", linewidth=1)
    below.set(ylabel="learning rate", xlabel="rows, over all layers", ylim=(0, None))
    below.xaxis.set_major_formatter(EngFormatter())
    # A layout that is found by drawing takes as long as the drawing.
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.08, top=0.98, hspace=0.08)
    figure.align_ylabels()
    return figure


def _whole(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of enough rows to be compared: the short batch that ends a run is one of few."""
    counts = np.diff([line["rows"] for line in lines], prepend=0)
    return [line for line, n in zip(lines, counts, strict=True) if n >= np.median(counts) / 2]


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]


def _plus(a: Any, b: Any) -> Any:
    return [_plus(x, y) for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a + b


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, allow_nan=False) + "\n"
