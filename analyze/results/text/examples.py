"""`mlsae examples`: the examples of one latent as text."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlsae.analyze.results.analysis import Analysis, load
from mlsae.analyze.results.columns import SAMPLE, TOP, TOP_LAYER
from mlsae.base.errors import InputError
from mlsae.base.units import counted

_BARS = "▁▂▃▄▅▆▇█"
"""Bars from the smallest value to the largest; a space stands for 0."""


def list_examples(analysis: Path, *, latent: int, layer: int | None, limit: int | None) -> str:
    """The strongest examples of a latent and its random ones, the peak between « and ».

    Args:
        analysis: directory of the analysis.
        latent: index of the latent.
        layer: the layer whose strongest examples are shown; None for those over all layers.
        limit: most of the strongest, and of each range; None for all.

    Raises:
        InputError: there is no such analysis, latent or layer, or it has no examples.
    """
    found = load(analysis)
    examples = found.examples_of(latent)
    layers = found.summary["layers"]
    if layer is not None and layer not in layers:
        raise InputError(
            f"the SAE has no layer {layer}: its layers are {', '.join(map(str, layers))}"
        )
    if len(examples) == 0:
        return f"latent {latent}: active for none of the rows evaluated"
    if limit is not None:
        examples = examples.filter(pc.field("rank") < limit)
    kind = TOP if layer is None else TOP_LAYER
    strongest = examples.filter(pc.field("kind") == kind)
    drawn = examples.filter(pc.field("kind") == SAMPLE)
    if layer is not None:
        strongest, drawn = (of.filter(pc.field("layer") == layer) for of in (strongest, drawn))
    where = f"at layer {layer}" if layer is not None else "over all layers"
    lines = [_of_latent(found, latent)]
    lines += ["", f"strongest {where}", *_lines(strongest, layers)]
    for quantile in sorted(set(drawn["quantile"].to_pylist()), reverse=True):
        part = drawn.filter(pc.field("quantile") == quantile)
        low, high = part["low"][0].as_py(), part["high"][0].as_py()
        lines += ["", f"drawn from above {low:.4g} to {high:.4g}", *_lines(part, layers)]
    return "\n".join(lines)


def _of_latent(analysis: Analysis, latent: int) -> str:
    row = analysis.latents.slice(latent, 1).to_pylist()[0]
    return (
        f"latent {latent}: active {counted(row['count'], 'time')}, density "
        f"{row['density']:.4g}, mean value {row['mean']:.4g}, layer {row['layer_mean']:.2f} ± "
        f"{row['layer_std']:.2f}"
    )


def _lines(examples: pa.Table, layers: Iterable[int]) -> list[str]:
    """A line for each example: value, layer, profile of the value over layers, window."""
    rows = examples.to_pylist()
    if not rows:
        return ["  none"]
    texts = [_window(row) for row in rows]
    # Peaks are aligned.
    before = max(len(left) for left, _ in texts)
    heads = [
        (f"{row['value']:.4g}", str(row["layer"]), _profile(row["layer_values"])) for row in rows
    ]
    widths = [max(len(head[n]) for head in heads) for n in range(2)]
    first, *_, last = layers if len(list(layers)) > 1 else [*layers, *layers]
    title = f"layers {first}–{last}"
    return [
        f"  {'value':>{widths[0]}}  layer  {title}",
        *(
            f"  {value:>{widths[0]}}  {layer:>5}  {profile:<{len(title)}}  {left:>{before}}{rest}"
            for (value, layer, profile), (left, rest) in zip(heads, texts, strict=True)
        ),
    ]


def _window(row: Mapping[str, Any]) -> tuple[str, str]:
    """Text before the peak, and the text from there on."""
    pieces = row["pieces"]
    if pieces is None:
        pieces = [f" {token}" for token in row["token_ids"]]
    shown = [_printable(piece) for piece in pieces]
    peak = row["peak"]
    return "".join(shown[:peak]), f"«{shown[peak]}»{''.join(shown[peak + 1 :])}"


def _printable(piece: str) -> str:
    return "".join(
        c if c.isprintable() else {"\n": "⏎", "\t": "⇥"}.get(c, "\N{REPLACEMENT CHARACTER}")
        for c in piece
    )


def _profile(values: list[float]) -> str:
    most = max(values)
    return "".join(
        " " if value == 0 else _BARS[min(len(_BARS) - 1, int(value / most * len(_BARS)))]
        for value in values
    )
