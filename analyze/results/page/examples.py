"""Examples that a page shows, as compact JSON in bounded size."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pd

from mlsae.analyze.results.page.json import as_json

Int = npt.NDArray[np.int64]

TOP, FIRST_TOP = 8, 3
"""Examples with the largest values that are shown, and those that come before any other kind."""

BEFORE, AFTER = 24, 8
"""Tokens shown before the peak and after it, in windows that have more."""

_AT_ONCE = 2048
_ORDER = ("top", "sample", "top_layer")
_READ = (
    "latent",
    "layer",
    "kind",
    "rank",
    "quantile",
    "token",
    "token_ids",
    "peak",
    "pieces",
    "values",
    "layer_values",
    "value",
)


def examples_data(examples: pd.Dataset, chosen: Int, most_bytes: int) -> dict[str, Any]:
    """Data on the shown latents' examples for the page's script.

    Where not all fit, every latent keeps as many as the others: first the three largest, then one
    from each value range that samples were drawn from, then more of the largest, at last the
    largest at each layer.

    Args:
        examples: the table `examples`.
        chosen: the shown latents' indices.
        most_bytes: JSON size that is not exceeded, nearly.

    Returns:
        `pieces`, different token texts; `examples`, in latent order: latent, kind (0
        top, 1 sample, 2 at a layer), quantile, layer, token, value, place of the peak, pieces by
        index, [place, percent of the largest value, …] of active tokens, and at the peak percent of
        the largest value by layer; `complete`, whether all those are there.
    """
    table = _chosen(examples, chosen)
    pieces: dict[str, int] = {}
    found: list[list[Any]] = []
    num_bytes, complete = 0, True
    for row in _rows(table):
        num_known = len(pieces)
        example = _example(row, pieces)
        new = itertools.islice(reversed(pieces), len(pieces) - num_known)
        num_bytes += sum(len(as_json(part).encode()) + 1 for part in (example, *new))
        if num_bytes > most_bytes:
            complete = False
            break
        found.append(example)
    found.sort(key=lambda example: example[0])
    return {"pieces": list(pieces), "examples": found, "complete": complete}


def _chosen(examples: pd.Dataset, chosen: Int) -> pa.Table:
    """Shown latents' examples, in the order in which they are kept while there is room."""
    kind, rank = pc.field("kind"), pc.field("rank")
    wanted = ((kind == "top") & (rank < TOP)) | (kind == "sample")
    wanted = wanted | ((kind == "top_layer") & (rank == 0))
    of_chosen = pc.field("latent").isin(pa.array(chosen, pa.int32()))
    table = examples.to_table(columns=list(_READ), filter=wanted & of_chosen)
    latent, kinds = table["latent"].to_numpy(), pc.index_in(table["kind"], pa.array(_ORDER))
    kinds, rank = kinds.to_numpy(), table["rank"].to_numpy()
    part = pc.fill_null(table["quantile"], 0).to_numpy()
    within = np.select([kinds == 0, kinds == 1], [rank, part], table["layer"].to_numpy())
    later = np.where((kinds == 0) & (rank >= FIRST_TOP), 1.5, kinds)
    order = np.lexsort((rank, latent, within, later))
    keys = np.stack([latent, kinds, within])[:, order]
    # One sample from each range is enough.
    first = np.unique(keys, axis=1, return_index=True)[1]
    return table.take(pa.array(order[np.sort(first)]))


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows, without those at a layer that are also among the largest over all layers."""
    seen: set[tuple[int, int, int]] = set()
    for first in range(0, len(table), _AT_ONCE):
        for row in table.slice(first, _AT_ONCE).to_pylist():
            key = (row["latent"], row["layer"], row["token"])
            if row["kind"] == "top_layer" and key in seen:
                continue
            seen.add(key)
            yield row


def _example(row: dict[str, Any], pieces: dict[str, int]) -> list[Any]:
    peak = row["peak"]
    first = max(0, peak - BEFORE)
    window = slice(first, peak + AFTER + 1)
    texts = row["pieces"]
    shown = [f"⟨{token}⟩" for token in row["token_ids"]] if texts is None else texts
    # Tokens that are no row in the store, or no eligible one, have no value.
    values = [value or 0.0 for value in row["values"][window]]
    most = max(*values, row["value"], 0.0)
    active = [(place, _percent(value, most)) for place, value in enumerate(values) if value > 0]
    largest = max(*row["layer_values"], 0.0)
    return [
        row["latent"],
        _ORDER.index(row["kind"]),
        row["quantile"],
        row["layer"],
        row["token"],
        float(f"{row['value']:.4g}"),
        peak - first,
        [pieces.setdefault(text, len(pieces)) for text in shown[window]],
        [number for pair in active for number in pair],
        [_percent(value, largest) for value in row["layer_values"]],
    ]


def _percent(value: float, most: float) -> int:
    return round(100 * value / most) if most > 0 and value > 0 else 0
