"""Rows for a copy: numbered as in the copy, and in its encoding."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.words import Key
from mlsae.store.copying.selection import Selection
from mlsae.store.format.calibration import Calibration, Calibrator
from mlsae.store.format.encoding import SiteCalibration
from mlsae.store.read.records import read_commit
from mlsae.store.read.store import Store
from mlsae.store.write.given import Rows

_BYTES_AT_ONCE = 2**26
"""Bytes of decoded rows, all layers and sites together, that are read at once; one chunk of each
array at least."""


class ChosenRows:
    """Reads them. Leaving it as a context manager ends its threads.

    Args:
        source: the store.
        selection: part of the store to read.
    """

    def __init__(self, source: Store, selection: Selection) -> None:
        self._source = source
        self._selection = selection
        per_sequence = source.rows_per_sequence
        self._first = selection.sequences[0] * per_sequence
        self.num_rows = selection.sequences[1] * per_sequence - self._first
        self.keeps_values = selection.encoding == source.encoding
        """True where stored values go into the copy as they are."""
        self._keys: list[Key] = [(s, layer) for s in selection.sites for layer in selection.layers]
        chunk_bytes = source.chunk_rows * source.d_model * 4 * len(self._keys)
        self._step = max(1, _BYTES_AT_ONCE // chunk_bytes) * source.chunk_rows
        self._pool = ThreadPoolExecutor(2 if source.is_local else 8)

    def __enter__(self) -> "ChosenRows":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def spans(self, rows: range) -> Iterator[tuple[int, int]]:
        """Pieces of some rows, cut where chunks of the source begin, so that each is read once."""
        start = rows.start
        while start < rows.stop:
            end = (self._first + start) // self._step * self._step + self._step - self._first
            yield start, min(end, rows.stop)
            start = end

    def read(self, start: int, stop: int) -> dict[Key, Rows]:
        """(site, layer) → rows start … stop − 1: as stored where that is kept, else float32.

        Raises:
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        if not self.keeps_values:
            return dict(self._decoded(start, stop))
        first, last = self._first + start, self._first + stop

        def stored(key: Key) -> Rows:
            parts = self._source.reader(*key).read(first, last)
            return parts if len(parts) > 1 else parts[0]

        return dict(zip(self._keys, self._pool.map(stored, self._keys), strict=True))

    def known_cost(self, rows: range) -> dict[str, dict[str, Any]] | None:
        """FVU that the encoding added to these rows, where they are a whole shard of the source."""
        source = self._source
        start, stop = self._first + rows.start, self._first + rows.stop
        shard, rest = divmod(start, source.shard_rows)
        is_shard = not rest and stop == source.plan.shard(shard).stop
        if not is_shard or not self.keeps_values:
            return None
        added = read_commit(source.objects, source.plan_id, shard).added_fvu
        if added is None:
            return None
        return {
            site: {str(layer): added[site][str(layer)] for layer in self._selection.layers}
            for site in self._selection.sites
        }

    def calibration(self) -> Calibration | None:
        """Calibration for int8: the source's if it is int8 too, else by the first eligible rows."""
        if self._selection.encoding != "int8":
            return None
        known = self._source.calibration
        if known is None:
            return self._calibrate()
        at = [self._source.layers.index(layer) for layer in self._selection.layers]
        return Calibration(
            num_rows=known.num_rows,
            sites={
                site: SiteCalibration(known.sites[site].mean[at], known.sites[site].scale[at])
                for site in self._selection.sites
            },
        )

    def _calibrate(self) -> Calibration:
        calibrator = Calibrator(self._keys, self._source.d_model)
        chunk = self._source.chunk_rows
        for start in range(0, self.num_rows, chunk):
            if calibrator.is_ready:
                break
            stop = min(start + chunk, self.num_rows)
            is_eligible = self._source.eligible(1, self._first + start, self._first + stop)
            decoded = self._decoded(start, stop)
            calibrator.add({key: rows[is_eligible] for key, rows in decoded})
        return calibrator.result()

    def _decoded(self, start: int, stop: int) -> Iterator[tuple[Key, npt.NDArray[np.float32]]]:
        first, last = self._first + start, self._first + stop

        def decoded(key: Key) -> npt.NDArray[np.float32]:
            return self._source.read(key[0], key[1], first, last)

        return zip(self._keys, self._pool.map(decoded, self._keys), strict=True)
