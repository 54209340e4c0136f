"""Rows in a chunk and in a shard, and bytes in a store, computed before it is written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.units import counted, format_bytes
from mlsae.store.format.encoding import Encoding, parts_of
from mlsae.store.format.moments import moments_bytes
from mlsae.store.format.positions import check_num_positions
from mlsae.store.schema import CRC_BYTES

CHUNK_BYTES = 2**20
COMPRESSED_CHUNK_BYTES = 2**18
"""Chunks that are read whole are smaller."""
SHARD_BYTES = 2**27
SMALL_SHARD_BYTES = 2**20
SMALL_SHARD_ROWS = 2**11
"""A shard's moments, 640 bytes a channel, take a sixth of so many rows of 16-bit values."""
ENOUGH_SHARDS = 16
"""Shards of a small store: less is lost when its producer is stopped in one of them."""
MAX_OBJECT_BYTES = 5 * 10**9
MAX_SHARDS = 999
"""With its metadata or its setup record a folder holds at most 1,000 objects."""
Number = TypeVar("Number", int, npt.NDArray[np.int64])
INDEX_ENTRY_BYTES = 16
TOKEN_CHUNK = 2**18
TOKEN_SHARD = 2**26


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes that follow from a plan."""

    num_rows: int
    """Rows of every activation array."""
    chunk_rows: int
    """Rows of an inner chunk, the unit of checking."""
    shard_rows: int
    """Rows of a shard, the unit of writing and resuming; a multiple of chunk and batch."""
    num_shards: int
    """Shards of every activation array."""
    total_bytes: int
    """Bytes of the whole store: activations, tokens, moments, records; at most, if compressed."""


def chunk_rows_for(
    num_rows: int, batch_rows: int, row_bytes: int, shard_bytes: int, chunk_bytes: int
) -> int:
    """Rows in a chunk: by bytes or a quarter of a small shard; divisor or multiple of a batch."""
    want = max(1, min(chunk_bytes, shard_bytes // 4) // row_bytes)
    if want >= batch_rows:
        return batch_rows * max(1, min(round(want / batch_rows), -(-num_rows // batch_rows)))
    divisors = [d for d in range(1, batch_rows + 1) if batch_rows % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / want)))


def shard_bytes_for(num_rows: int, row_bytes: int) -> int:
    """Bytes of a shard by default: SHARD_BYTES, or less, so that there are enough of them."""
    if num_rows * row_bytes <= SMALL_SHARD_BYTES:
        return SHARD_BYTES
    rows = max(num_rows // ENOUGH_SHARDS, SMALL_SHARD_ROWS)
    return min(SHARD_BYTES, max(SMALL_SHARD_BYTES, rows * row_bytes))


def chunk_offset(inner: Number, row: Number, chunk_rows: Number, row_bytes: Number) -> Number:
    """First byte, in a shard that is not compressed, of a row of its chunk `inner`.

    Of numbers or of arrays, which broadcast.
    """
    offset: Number = inner * (chunk_rows * row_bytes + CRC_BYTES) + row * row_bytes
    return offset


def object_bytes(rows: int, row_bytes: int, chunk_rows: int, shard_rows: int) -> int:
    """Bytes of one shard object that holds `rows` rows: chunks, their checksums, index."""
    used = -(-rows // chunk_rows)
    index = (shard_rows // chunk_rows) * INDEX_ENTRY_BYTES + CRC_BYTES
    return used * (chunk_rows * row_bytes + CRC_BYTES) + index


def array_bytes(num_rows: int, row_bytes: int, chunk_rows: int, shard_rows: int) -> int:
    """Bytes of an array, all its shards together."""
    full, rest = divmod(num_rows, shard_rows)
    sizes = full * object_bytes(shard_rows, row_bytes, chunk_rows, shard_rows)
    return sizes + (object_bytes(rest, row_bytes, chunk_rows, shard_rows) if rest else 0)


def token_rows_for(num_tokens: int) -> tuple[int, int]:
    """Tokens in a chunk and in a shard: whole chunks, no more than needed."""
    chunk = min(TOKEN_CHUNK, num_tokens)
    chunks = max(TOKEN_SHARD // chunk, -(-num_tokens // (MAX_SHARDS * chunk)))
    return chunk, min(chunks, -(-num_tokens // chunk)) * chunk


def plan_layout(
    *,
    num_tokens: int,
    context_length: int,
    layers: Sequence[int],
    sites: Sequence[str],
    d_model: int,
    encoding: Encoding,
    batch_sequences: int,
    shard_bytes: int = SHARD_BYTES,
    keep_positions: int | None = None,
    compressed: bool = False,
) -> Layout:
    """Choose chunk and shard rows and add up the store's bytes.

    A shard is whole batches of about `shard_bytes` bytes, larger only where a folder would hold
    over 1,000 objects.

    Raises:
        InputError: no shard size keeps every object under 5 GB and every folder under 1,000, or
            keep_positions is not in 1 … context_length.
    """
    if keep_positions is not None:
        check_num_positions(keep_positions, context_length)
    rows_per_sequence = context_length if keep_positions is None else keep_positions
    parts = parts_of(encoding, d_model)
    row_bytes = parts[0].row_bytes
    batch_rows = batch_sequences * rows_per_sequence
    num_rows = num_tokens // context_length * rows_per_sequence
    chunk_bytes = COMPRESSED_CHUNK_BYTES if compressed else CHUNK_BYTES
    chunk_rows = chunk_rows_for(num_rows, batch_rows, row_bytes, shard_bytes, chunk_bytes)
    unit = max(batch_rows, chunk_rows)
    units = max(1, shard_bytes // (unit * row_bytes), -(-num_rows // (MAX_SHARDS * unit)))
    shard_rows = unit * min(units, -(-num_rows // unit))
    size = object_bytes(shard_rows, row_bytes, chunk_rows, shard_rows)
    if size > MAX_OBJECT_BYTES:
        raise InputError(
            f"a shard would take {format_bytes(size)}, over the {format_bytes(MAX_OBJECT_BYTES)} "
            f"that an object may, and a folder holds {MAX_SHARDS} of them: lower --batch-size, "
            f"--shard-size or --max-tokens"
        )
    num_shards = -(-num_rows // shard_rows)
    num_arrays = len(layers) * len(sites)
    activations = num_arrays * sum(
        array_bytes(num_rows, part.row_bytes, chunk_rows, shard_rows) for part in parts
    )
    token_rows = token_rows_for(num_tokens)
    token_size = object_bytes(token_rows[1], 8, *token_rows)
    if token_size > MAX_OBJECT_BYTES:
        raise InputError(f"a store cannot hold {counted(num_tokens, 'token')}; lower --max-tokens")
    tokens = sum(array_bytes(num_tokens, itemsize, *token_rows) for itemsize in (4, 4, 1))
    if keep_positions is not None:
        tokens += array_bytes(num_rows, 8, *token_rows)
    if encoding == "int8":
        tokens += 2 * num_arrays * (4 * d_model + CRC_BYTES + INDEX_ENTRY_BYTES)
    of_shard = moments_bytes(len(layers), len(sites), d_model)
    if of_shard > MAX_OBJECT_BYTES:
        raise InputError(
            f"the moments of {counted(num_arrays, 'array')}, one for each layer and site, would "
            f"take {format_bytes(of_shard)}, over the {format_bytes(MAX_OBJECT_BYTES)} that an "
            "object may: harvest fewer --layers or --sites at once"
        )
    moments = (num_shards + 1) * of_shard
    records = 4096 * (num_shards + num_arrays + 8)
    return Layout(
        num_rows=num_rows,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        num_shards=num_shards,
        total_bytes=activations + tokens + moments + records,
    )
