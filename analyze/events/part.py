"""A part of the table `events`: a file with the events in some rows at a layer, by latent.

Shapes: N rows in a batch, K slots a row, E events held.
"""

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mlsae.analyze.results.records import PartRecord
from mlsae.base.files import fsync_directory, full_disk_explained, open_partial, sha256_file

GROUP_EVENTS = 2**15
"""Events in a row group, the least that a query for one latent reads from a part."""

BYTES_PER_EVENT = 9
"""Disk bytes required in advance; 6 to 8 were measured, over 3 of them for the value."""

_ENCODING = {
    "row": "DELTA_BINARY_PACKED",
    "token": "DELTA_BINARY_PACKED",
    "layer": "DELTA_BINARY_PACKED",
    "latent": "DELTA_BINARY_PACKED",
    "value": "BYTE_STREAM_SPLIT",
}


class PartWriter:
    """Writes one part: takes rows, and writes their events sorted by latent, then row.

    More events than `part_events` are written as several sorted stretches, so memory does not
    depend on the number of latents that a row uses. A context manager: when its block ends without
    an exception, the file is whole and durable and `record` describes it; otherwise there is none.

    Args:
        directory: the data set's folder, with the layer's folder in it.
        path: the part's path within `directory`.
        scratch: folder on the same file system for the file while it is written; not one of the
            data set, since readers take every file in those.
        schema: the table's schema.
        layer: layer id of all rows.
        num_latents: number of latents of the SAE.
        part_events: most events of a stretch, exceeded by less than a batch.
    """

    def __init__(
        self,
        directory: Path,
        path: str,
        *,
        scratch: Path,
        schema: pa.Schema,
        layer: int,
        num_latents: int,
        part_events: int,
    ) -> None:
        self.record: PartRecord | None = None
        self._path, self._name = directory / path, path
        self._scratch = scratch / self._path.name
        self._schema, self._layer = schema, layer
        self._num_latents, self._part_events = num_latents, part_events
        self._held: list[tuple[npt.NDArray[Any], ...]] = []
        self._num_held = 0
        self._num_events = 0

    def __enter__(self) -> Self:
        self._partial, fd = open_partial(self._scratch)
        self._file = os.fdopen(fd, "wb")
        self._writer = pq.ParquetWriter(
            self._file,
            self._schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding=_ENCODING,
            write_page_checksum=True,
        )
        return self

    def append(
        self,
        rows_N: npt.NDArray[np.int64],
        tokens_N: npt.NDArray[np.int64],
        values_NK: npt.NDArray[np.float32],
        indices_NK: npt.NDArray[np.int64],
    ) -> None:
        """Add the active latents (value not 0) of the next rows, whose tokens are `tokens_N`.

        Raises:
            ResourceError: the disk is full.
        """
        active = values_NK != 0
        counts_N = active.sum(axis=1)
        latents_E = indices_NK[active].astype(np.int32)
        self._held.append((rows_N, tokens_N, counts_N, latents_E, values_NK[active]))
        self._num_held += len(latents_E)
        if self._num_held >= self._part_events:
            self._write_stretch()

    def _write_stretch(self) -> None:
        rows_N, tokens_N, counts_N, latents_E, values_E = (
            np.concatenate(parts) for parts in zip(*self._held, strict=True)
        )
        self._held, self._num_held = [], 0
        self._num_events += len(latents_E)
        order_E = _by_latent(latents_E, self._num_latents)
        place_E = np.repeat(np.arange(len(rows_N), dtype=np.int32), counts_N)
        with full_disk_explained(self._path):
            for first in range(0, len(order_E), GROUP_EVENTS):
                chosen = order_E[first : first + GROUP_EVENTS]
                at = place_E[chosen]
                layers = np.full(len(chosen), self._layer, dtype=np.int32)
                columns = [rows_N[at], tokens_N[at], layers, latents_E[chosen], values_E[chosen]]
                # Each call writes a row group.
                self._writer.write_table(pa.table(columns, schema=self._schema))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with full_disk_explained(self._path):
                    self._finish()
        finally:
            # After a full disk the footer cannot be written either, and the file is removed.
            with suppress(OSError):
                self._writer.close()
            self._writer.is_open = False
            with suppress(OSError):
                self._file.close()
            self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._held:
            self._write_stretch()
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self.record = PartRecord(
            path=self._name,
            num_events=self._num_events,
            num_bytes=self._partial.stat().st_size,
            sha256=sha256_file(self._partial),
        )
        self._partial.rename(self._path)
        fsync_directory(self._path.parent)


def _by_latent(latents_E: npt.NDArray[np.int32], num_latents: int) -> npt.NDArray[np.int64]:
    """The order that sorts events by latent, stable within a latent."""
    # A radix sort serves 16 bits, six times as fast.
    narrow = latents_E.astype(np.uint16) if num_latents <= 2**16 else latents_E
    return np.argsort(narrow, kind="stable")
