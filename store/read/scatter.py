"""Runs of neighbouring rows, read by one call, each row to its own place.

A reader that mixes rows asks for tens of thousands of short runs a second, and each read by itself
would cost more than its bytes. Nor does it want neighbours beside each other: the kernel, which
copies the bytes in any case, puts each row where it is wanted. What cannot be read so (compressed
and remote chunks, chunks that were not checked before, systems without such a call) is read run by
run and put there afterwards.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlsae.store.format.encoding import Part
from mlsae.store.format.layout import chunk_offset
from mlsae.store.read.aio import MOST_VECTORS, Queue, open_queue
from mlsae.store.read.interface import AnyReader

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]

_WIDE = 256
"""Bytes per row from which the kernel puts it in place; it takes longer than numpy for less."""


class Runs(NamedTuple):
    """Runs of neighbouring rows, and where the rows go; equally long arrays."""

    reader: Int64
    """(n,) reader index."""
    start: Int64
    """(n,) first row."""
    num_rows: Int64
    """(n,)"""
    place: Int64
    """(n, width) where each row in a run goes; the last place from its number of rows on."""

    def part(self, first: int, stop: int) -> "Runs":
        """Runs from `first` to before `stop`."""
        return Runs(*(values[first:stop] for values in self))


class _Pieces(NamedTuple):
    """Runs, cut where chunks and stores end and where one read must; equally long arrays."""

    run: Int64
    segment: Int64
    chunk: Int64
    inner: Int64
    """First row in the chunk."""
    num_rows: Int64
    first: Int64
    """The first row's index among all runs' places."""


class ScatteredRows:
    """Memory for rows, and runs that are read into it; several threads may read at once.

    Args:
        readers: reader for each site and layer, as the runs count them.
        num_rows: places. There is one more, the last, for rows that nobody wants.
    """

    def __init__(self, readers: Sequence[AnyReader], num_rows: int) -> None:
        self._parts: Sequence[Part] = readers[0].parts
        self.rows: list[Array] = [
            np.zeros((num_rows + 1, part.width), part.dtype) for part in self._parts
        ]
        """(num_rows + 1, width) for each part that a row has."""
        # As one item a row, numpy puts rows in place many times as fast.
        self._items = [_as_items(rows) for rows in self.rows]
        self._readers = readers
        self._local = threading.local()
        # One for each reader in each store, in one count over all their rows.
        self._segments = [segment for reader in readers for _, segment in reader.segments]
        firsts = np.array([first for reader in readers for first, _ in reader.segments])
        self._num_rows = np.array([segment.num_rows for segment in self._segments])
        self._chunk_rows = np.array([segment.chunk_rows for segment in self._segments])
        self._num_chunks = np.array([segment.chunks_per_shard for segment in self._segments])
        of_reader = np.repeat(np.arange(len(readers)), [len(r.segments) for r in readers])
        self._all_rows = int(np.bincount(of_reader, self._num_rows).max())
        self._firsts = of_reader * self._all_rows + firsts

    def read(self, runs: Runs) -> None:
        """Read runs, each row to its place.

        Args:
            runs: to places that no other thread reads to or from meanwhile, but for the last.

        Raises:
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
            IndexError: there are no such rows or places.
        """
        places, width = len(self.rows[0]), runs.place.shape[1]
        if not (runs.place.min() >= 0 and runs.place.max() < places):
            raise IndexError(f"runs do not fit into {places} places")
        if not ((runs.num_rows >= 0) & (runs.num_rows <= width)).all():
            raise IndexError(f"runs have more rows than the {width} places of each")
        if not ((runs.start >= 0) & (runs.start + runs.num_rows <= self._all_rows)).all():
            raise IndexError(f"runs are not among the {self._all_rows} rows")
        rest: Sequence[int] = range(len(runs.start))
        if (queue := self._queue()) is not None:
            rest = self._read_at_once(queue, runs)
        # Read again in the usual way, failed runs raise their errors.
        for i in rest:
            num_rows = int(runs.num_rows[i])
            found = [np.empty((num_rows, part.width), part.dtype) for part in self._parts]
            self._readers[int(runs.reader[i])].read_into(found, int(runs.start[i]))
            for items, some in zip(self._items, found, strict=True):
                items[runs.place[i, :num_rows]] = _as_items(some)

    def _read_at_once(self, queue: Queue, runs: Runs) -> list[int]:
        """Read the runs that one call can read; return the indices of the others."""
        pieces = self._pieces(runs)
        found = [
            self._segments[segment].files(number)
            for segment, number in zip(pieces.segment.tolist(), pieces.chunk.tolist(), strict=True)
        ]
        files = [file for file in found if file is not None]
        is_ready = np.array([file is not None for file in found])
        ready = pieces if len(files) == len(found) else _Pieces(*(v[is_ready] for v in pieces))
        place, is_read = runs.place.reshape(-1), is_ready.copy()
        for number in range(len(self._parts)):
            numbers = np.array([file[number].number for file in files], np.int64)
            is_read[is_ready] &= self._read_part(queue, number, numbers, ready, place)
        return [] if is_read.all() else sorted(set(pieces.run[~is_read].tolist()))

    def _read_part(
        self, queue: Queue, number: int, files: Int64, pieces: _Pieces, place: Int64
    ) -> npt.NDArray[np.bool_]:
        """(n,) whether all was read of one part of the rows of each piece."""
        row_bytes = self._parts[number].row_bytes
        chunk_rows = self._chunk_rows[pieces.segment]
        in_shard = pieces.chunk % self._num_chunks[pieces.segment]
        offset = chunk_offset(in_shard, pieces.inner, chunk_rows, row_bytes)
        if row_bytes >= _WIDE:
            memory = self.rows[number]
            got = queue.read(files, offset, memory, pieces.first, pieces.num_rows, place)
        else:
            apart = np.empty(len(place), self._items[number].dtype)
            got = queue.read(files, offset, apart, pieces.first, pieces.num_rows)
            self._items[number][place] = apart
        is_read: npt.NDArray[np.bool_] = got == pieces.num_rows * row_bytes
        return is_read

    def _pieces(self, runs: Runs) -> _Pieces:
        row = runs.reader * self._all_rows + runs.start
        at = np.searchsorted(self._firsts, row, side="right") - 1
        row -= self._firsts[at]
        first = np.arange(len(at)) * runs.place.shape[1]
        run, left, pieces = np.arange(len(at)), runs.num_rows, []
        while True:
            chunk, inner = np.divmod(row, self._chunk_rows[at])
            end = np.minimum(self._chunk_rows[at] - inner, self._num_rows[at] - row)
            num_rows = np.minimum(np.minimum(left, end), MOST_VECTORS)
            pieces.append((run, at, chunk, inner, num_rows, first))
            more = np.flatnonzero(left > num_rows)
            if not len(more):
                return _Pieces(*(np.concatenate(values) for values in zip(*pieces, strict=True)))
            run, at, first = run[more], at[more], first[more] + num_rows[more]
            row, left = row[more] + num_rows[more], left[more] - num_rows[more]
            is_next = row == self._num_rows[at]
            at, row = at + is_next, np.where(is_next, 0, row)

    def _queue(self) -> Queue | None:
        """The thread's own."""
        if not hasattr(self._local, "queue"):
            self._local.queue = open_queue()
        queue: Queue | None = self._local.queue
        return queue


def _as_items(rows: Array) -> Array:
    """(n,) one item for each of (n, width) rows, in the same memory."""
    return rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).reshape(-1)
