"""The table `activations`: every active latent of every row, streamed to Parquet."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 2**20
"""Events of a row group: what is held in memory."""

BYTES_PER_EVENT = 10
"""Disk to ask for in advance; sorted rows cost little, latents and values 3 to 7 bytes."""

_ENCODING = {
    "row": "DELTA_BINARY_PACKED",
    "token": "DELTA_BINARY_PACKED",
    "layer": "PLAIN",
    "latent": "PLAIN",
    "value": "BYTE_STREAM_SPLIT",
}


class EventsWriter:
    """Writes one layer's events in the order of rows, then latents, in row groups of fixed size.

    A context manager; the file is whole once the block has been left without an exception.
    """

    def __init__(self, path: Path, schema: pa.Schema, layer: int) -> None:
        self._layer = layer
        self._schema = schema
        self._held: list[tuple[npt.NDArray[Any], ...]] = []
        self._num_held = 0
        self._writer = pq.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=False, column_encoding=_ENCODING
        )
        self.num_events = 0

    def append(
        self,
        rows_N: npt.NDArray[np.int64],
        tokens_N: npt.NDArray[np.int64],
        values_NK: npt.NDArray[np.float32],
        indices_NK: npt.NDArray[np.int64],
    ) -> None:
        """Add the active latents (value > 0) of the next rows, which belong to `tokens_N`."""
        order = np.argsort(indices_NK, axis=1)
        values = np.take_along_axis(values_NK, order, axis=1)
        latents = np.take_along_axis(indices_NK, order, axis=1)
        active = values > 0
        rows, tokens = (np.repeat(of_row, active.sum(axis=1)) for of_row in (rows_N, tokens_N))
        self._held.append((rows, tokens, latents[active].astype(np.int32), values[active]))
        self._num_held += len(rows)
        self.num_events += len(rows)
        if self._num_held >= ROW_GROUP:
            self._write(self._num_held - self._num_held % ROW_GROUP)

    def _write(self, count: int) -> None:
        columns = [np.concatenate(parts) for parts in zip(*self._held, strict=True)]
        rows, tokens, latents, values = (column[:count] for column in columns)
        layer = np.full(count, self._layer, dtype=np.int32)
        table = pa.table([rows, tokens, layer, latents, values], schema=self._schema)
        self._writer.write_table(table, row_group_size=ROW_GROUP)
        self._held = [tuple(column[count:] for column in columns)]
        self._num_held -= count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._num_held:
            self._write(self._num_held)
        self._writer.close()
