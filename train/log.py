"""log.jsonl, one line for every so many steps, and curves.png drawn from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlsae.train.trainer import StepResult

LINES = 1000
"""A run logs about so many lines, however long it is."""


class Averages:
    """What happened since the last line of the log."""

    def __init__(self) -> None:
        self._results: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self._results.append(result)

    def take(self) -> dict[str, Any]:
        """Means over the steps since the last call; `fvu` is the main term over all rows."""
        results, self._results = self._results, []
        errors = torch.stack([result.layer_errors for result in results]).sum(0)
        rows = torch.stack([result.layer_rows for result in results]).sum(0)
        total = float(rows.sum())
        return {
            "loss": sum(result.loss for result in results) / len(results),
            "aux": sum(result.aux for result in results) / len(results),
            "fvu": float(errors.sum()) / total,
            "fvu_by_layer": [
                e / n if n else None for e, n in zip(errors.tolist(), rows.tolist(), strict=True)
            ],
            "l0": sum(result.num_active for result in results) / total,
            "num_dead": results[-1].num_dead,
        }


class Log:
    """log.jsonl of a run; a resumed run goes on where its checkpoint was made.

    Args:
        path: of the file.
        step: lines of later steps are taken off.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_log(path) if line["step"] <= step] if path.exists() else []
        path.write_text("".join(_line(line) for line in kept))
        self._path = path

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        with self._path.open("a") as file:
            file.write(_line(line))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a crash cut short is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def draw_curves(lines: list[dict[str, Any]], layers: tuple[int, ...], path: Path) -> None:
    """FVU by layer, dead latents and learning rate over rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    figure = Figure(figsize=(7, 7), layout="constrained")
    FigureCanvasAgg(figure)
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    rows = [line["rows"] for line in lines]
    colours = _colours(len(layers))
    for i, layer in enumerate(layers):
        fvu = [line["fvu_by_layer"][i] for line in lines]
        above.plot(rows, fvu, color=colours[i], linewidth=1, label=f"layer {layer}")
    above.plot(rows, [line["fvu"] for line in lines], "k--", linewidth=1, label="all layers")
    above.set(ylabel="FVU of the batches", yscale="log")
    for ticks in (above.yaxis.set_major_formatter, above.yaxis.set_minor_formatter):
        ticks(StrMethodFormatter("{x:g}"))
    above.legend(fontsize="small", ncols=2)
    middle.plot(rows, [line["num_dead"] for line in lines], "k-", linewidth=1)
    middle.set(ylabel="dead latents", ylim=(0, max(1, *(line["num_dead"] for line in lines))))
    below.plot(rows, [line["lr"] for line in lines], "k-", linewidth=1)
    below.set(ylabel="learning rate", xlabel="rows, over all layers", ylim=(0, None))
    below.xaxis.set_major_formatter(EngFormatter())
    figure.savefig(path, dpi=120)


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, allow_nan=False) + "\n"
