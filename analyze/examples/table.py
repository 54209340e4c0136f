"""The table `examples`: written latent by latent, so that one is read without the others.

Shapes: m latents in a slab, L layers, S strongest at a layer, s samples from each range, R table
rows, W window places.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from mlsae.analyze.examples.collect import Examples
from mlsae.analyze.examples.sample import RANGES
from mlsae.analyze.examples.windows import OUTSIDE
from mlsae.analyze.results.columns import KINDS, SAMPLE

ROW_GROUP = 2**14
"""Examples in a row group, about: whole latents; one group is read at a time."""

Array = npt.NDArray[Any]


def write_examples(
    path: Path,
    schema: pa.Schema,
    examples: Examples,
    pieces: Callable[[Array], list[str]] | None,
    progress: Callable[[int], object],
) -> int:
    """Write the file; memory: a row group.

    Args:
        path: the file.
        schema: the table's schema.
        examples: after `finish`.
        pieces: the texts of some token ids; None where they are not known.
        progress: told how many latents are done, again and again.

    Returns:
        Number of examples.
    """
    held: list[pa.Table] = []
    num_held = total = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table, num_latents in _slabs(examples, schema, pieces):
            held.append(table)
            num_held += len(table)
            total += len(table)
            progress(num_latents)
            if num_held >= ROW_GROUP:
                writer.write_table(pa.concat_tables(held), row_group_size=num_held)
                held, num_held = [], 0
        if num_held:
            writer.write_table(pa.concat_tables(held), row_group_size=num_held)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return total


def _slabs(
    examples: Examples, schema: pa.Schema, pieces: Callable[[Array], list[str]] | None
) -> Iterator[tuple[pa.Table, int]]:
    """Examples of some latents after others, and the number of latents."""
    plan, num_layers = examples.plan, len(examples.layers)
    widest = plan.top * (num_layers + 1) + plan.samples * RANGES
    # Half a row group, so that two or three make one at about the size.
    at_once = max(1, ROW_GROUP // 2 // widest)
    for first in range(0, examples.num_latents, at_once):
        last = min(first + at_once, examples.num_latents)
        yield _table(_columns(examples, first, last, pieces), schema), last - first


def _columns(
    examples: Examples, first: int, last: int, pieces: Callable[[Array], list[str]] | None
) -> dict[str, Any]:
    """Columns by name, arrays (R,) or Arrow arrays."""
    plan, num_layers, num_latents = examples.plan, len(examples.layers), last - first
    known = [
        _by_latent(*of, num_latents)
        for of in (
            examples.top.read(first * num_layers, last * num_layers),
            examples.samples.read(first, last),
        )
    ]
    (top_has, top), (sample_has, sample) = known
    num_top = top_has.shape[1]
    of = {name: np.concatenate([top[name], sample[name]], axis=1) for name in top}
    value = np.where(
        np.concatenate([top_has, sample_has], axis=1), of["values"][:, :, plan.before], -np.inf
    )
    event = of["event"][:, :, 0]
    strongest, again = (
        kept[:, : plan.top]
        for kept in _of_distinct_tokens(value[:, :num_top], event[:, :num_top], num_layers)
    )
    in_range = (num_latents, RANGES, plan.samples)
    drawn = np.lexsort(
        (event[:, num_top:].reshape(in_range), -value[:, num_top:].reshape(in_range))
    )
    drawn += np.arange(RANGES)[:, None] * plan.samples + num_top
    # Each latent's examples in the table's order, as indices into the fields.
    chosen = np.concatenate(
        [
            strongest,
            np.broadcast_to(np.arange(num_top), (num_latents, num_top)),
            drawn.reshape(num_latents, -1),
        ],
        axis=1,
    )
    sizes = (strongest.shape[1], num_top, RANGES * plan.samples)
    kind = np.repeat(np.arange(len(KINDS)), sizes)
    quantile = np.concatenate(
        [np.zeros(sum(sizes[:2])), np.repeat(np.arange(RANGES), plan.samples)]
    )
    rank = np.concatenate(
        [
            np.arange(sizes[0]),
            np.tile(np.arange(plan.top), num_layers),
            np.tile(np.arange(plan.samples), RANGES),
        ]
    )
    value = np.take_along_axis(value, chosen, axis=1)
    value[:, : sizes[0]][again] = -np.inf
    latent, column = (value > 0).nonzero()
    place = chosen[latent, column]
    edges = np.zeros((num_latents, RANGES + 1), dtype=np.float32)
    edges[:, 1:RANGES] = examples.samples.edges[:, first:last].cpu().numpy().T
    edges[:, RANGES] = value[:, 0]
    is_sample = kind[column] == KINDS.index(SAMPLE)
    part = quantile[column].astype(np.int32)
    event = event[latent, place]
    ids, values = of["ids"][latent, place], of["values"][latent, place]
    inside = ids != OUTSIDE
    layer_values = of["layer_values"][latent, place]
    return {
        "latent": latent + first,
        "layer": np.array(examples.layers)[event % num_layers],
        "kind": pa.array(KINDS).take(pa.array(kind[column])),
        "rank": rank[column],
        "quantile": pa.array(part, mask=~is_sample),
        "low": pa.array(edges[latent, part], mask=~is_sample),
        "high": pa.array(edges[latent, part + 1], mask=~is_sample),
        "row": of["row"][latent, place, 0],
        "token": event // num_layers,
        "token_ids": _lists(ids[inside], inside),
        "peak": inside[:, : plan.before].sum(axis=1),
        "pieces": _pieces(ids[inside], inside, pieces),
        "values": _lists(pa.array(values[inside], from_pandas=True), inside),
        "layer_values": _lists(layer_values.reshape(-1), np.ones_like(layer_values, dtype=bool)),
        "value": values[:, plan.before],
    }


def _of_distinct_tokens(value_mE: Array, event_mE: Array, num_layers: int) -> tuple[Array, Array]:
    """Sort each latent's events by value, the strongest of every token before all repetitions.

    The S strongest tokens are among the S strongest events of each layer: a token that is not has S
    better ones at the layer where it is strongest.

    Args:
        value_mE: values, −∞ where there is no event.
        event_mE: token · L + index of the layer.
        num_layers: L.

    Returns:
        (m, E) indices of the events in order, and (m, E) True for repetitions.
    """
    order = np.lexsort((event_mE, -value_mE))
    token = np.take_along_axis(event_mE // num_layers, order, axis=1)
    by_token = np.argsort(token, axis=1, kind="stable")
    again = np.zeros_like(order, dtype=bool)
    sorted_token = np.take_along_axis(token, by_token, axis=1)
    np.put_along_axis(again, by_token[:, 1:], sorted_token[:, 1:] == sorted_token[:, :-1], axis=1)
    firsts_first = np.argsort(again, axis=1, kind="stable")
    order, again = (np.take_along_axis(of, firsts_first, axis=1) for of in (order, again))
    return order, again


def _by_latent(
    has: Tensor, fields: Mapping[str, Tensor], num_latents: int
) -> tuple[Array, Mapping[str, Array]]:
    """(m, groups · size), and (m, groups · size, width) by field."""
    return has.reshape(num_latents, -1).cpu().numpy(), {
        name: values.reshape(num_latents, -1, values.shape[2]).cpu().numpy()
        for name, values in fields.items()
    }


def _lists(flat: Array | pa.Array, inside: Array) -> pa.Array:
    """A list for each row in `inside`, with as many values as it marks."""
    ends = inside.sum(axis=1).cumsum().astype(np.int32)
    return pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), flat)


def _pieces(flat: Array, inside: Array, pieces: Callable[[Array], list[str]] | None) -> pa.Array:
    if pieces is None:
        return pa.nulls(len(inside), pa.list_(pa.string()))
    ids, at = np.unique(flat, return_inverse=True)
    return _lists(pa.array(pieces(ids), pa.string()).take(pa.array(at)), inside)


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table(
        [pa.array(columns[field.name]).cast(field.type) for field in schema], schema=schema
    )
