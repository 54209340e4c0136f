"""Many runs of neighbouring rows, read by one call.

A reader that mixes rows asks for tens of thousands of short runs a second, and each read by itself
would cost more than its bytes. What cannot be read so (compressed and remote chunks, chunks that
were not checked before, systems without such a call) is read run by run, to the same places.
"""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlsae.store.aio import MOST_READS, Queue, open_queue
from mlsae.store.corpus import CorpusReader
from mlsae.store.encoding import Part
from mlsae.store.layout import chunk_offset
from mlsae.store.objects import Descriptor
from mlsae.store.reader import RowReader

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]


class Runs(NamedTuple):
    """Runs of neighbouring rows; arrays of one length."""

    reader: Int64
    """Index of the reader."""
    start: Int64
    """First row."""
    num_rows: Int64
    line: Int64
    """Where the run goes."""
    column: Int64
    """Of its line, where the first row goes; the others follow."""

    def part(self, first: int, stop: int) -> "Runs":
        """Some of them."""
        return Runs(*(values[first:stop] for values in self))


class Lines:
    """Memory of many lines, and runs that are read into them; several threads may read at once.

    Args:
        readers: of one site and layer each, as the runs count them.
        num_lines: lines.
        num_columns: rows that a line holds.
    """

    def __init__(
        self, readers: Sequence[RowReader | CorpusReader], num_lines: int, num_columns: int
    ) -> None:
        parts: Sequence[Part] = readers[0].parts
        self.rows: list[Array] = [
            np.zeros((num_lines, num_columns, part.width), part.dtype) for part in parts
        ]
        """(num_lines, num_columns, width) for each part of a row."""
        self._readers = readers
        self._local = threading.local()
        self._addresses = np.array([[rows.ctypes.data] for rows in self.rows])
        self._row_bytes = np.array([[part.row_bytes] for part in parts])
        # One for each reader of each store, in one count of the rows of all.
        self._segments = [segment for reader in readers for _, segment in reader.segments]
        firsts = np.array([first for reader in readers for first, _ in reader.segments])
        self._num_rows = np.array([segment.num_rows for segment in self._segments])
        self._chunk_rows = np.array([segment.chunk_rows for segment in self._segments])
        self._num_chunks = np.array([segment.chunks_per_shard for segment in self._segments])
        of_reader = np.repeat(np.arange(len(readers)), [len(r.segments) for r in readers])
        self._all_rows = int(np.bincount(of_reader, self._num_rows).max())
        self._firsts = of_reader * self._all_rows + firsts

    def read(self, runs: Runs) -> None:
        """Read runs, each to its line.

        Args:
            runs: of rows, to places that no other thread reads to or from meanwhile.

        Raises:
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
            IndexError: there are no such rows, no such line, or a run is longer than what is left
                of it. The kernel would write beyond it.
        """
        num_lines, num_columns, _ = self.rows[0].shape
        ends = runs.column + runs.num_rows
        fits = (runs.column >= 0) & (ends <= num_columns) & (runs.line >= 0)
        if not (fits & (runs.line < num_lines)).all():
            raise IndexError(f"runs do not fit into {num_lines} lines of {num_columns} rows")
        if not ((runs.start >= 0) & (runs.start + runs.num_rows <= self._all_rows)).all():
            raise IndexError(f"runs are not among the {self._all_rows} rows")
        rest: Sequence[int] = range(len(ends))
        if (queue := self._queue()) is not None:
            rest = self._read_at_once(queue, runs)
        # Read again in the usual way, those that failed say what is wrong.
        for i in rest:
            reader, start, num_rows, line, column = (int(values[i]) for values in runs)
            out = [rows[line, column : column + num_rows] for rows in self.rows]
            self._readers[reader].read_into(out, start)

    def _read_at_once(self, queue: Queue, runs: Runs) -> list[int]:
        """Read what can be read by one call; the indices of the other runs."""
        run, at, chunk, inner, num_rows, place = self._pieces(runs)
        files: list[Sequence[Descriptor] | None] = [
            self._segments[segment].files(number)
            for segment, number in zip(at.tolist(), chunk.tolist(), strict=True)
        ]
        ready = [i for i, found in enumerate(files) if found is not None]
        numbers = np.array([[file.number for file in files[i] or ()] for i in ready], np.int64)
        if len(ready) < len(files):
            at, chunk, inner, num_rows, place = (
                values[ready] for values in (at, chunk, inner, num_rows, place)
            )
        in_shard = chunk % self._num_chunks[at]
        offset = chunk_offset(in_shard, inner, self._chunk_rows[at], self._row_bytes)
        address = place * self._row_bytes + self._addresses
        size = num_rows * self._row_bytes
        # All of one part, then all of the next.
        reads = [values.reshape(-1) for values in (numbers.T, offset, address, size)]
        is_complete = np.empty(size.size, np.bool_)
        for first in range(0, size.size, MOST_READS):
            some = [values[first : first + MOST_READS] for values in reads]
            is_complete[first : first + MOST_READS] = queue.read(*some) == some[-1]
        if len(ready) == len(files) and is_complete.all():
            return []
        done = np.zeros(len(files), np.bool_)
        done[ready] = is_complete.reshape(size.shape).all(axis=0)
        return sorted(set(run[~done].tolist()))

    def _pieces(self, runs: Runs) -> tuple[Int64, ...]:
        """Runs, cut where chunks and stores end.

        Returns:
            Of each piece the run, the segment, the chunk, the first row in it, the number of rows,
            and the place of the first in the memory of all lines.
        """
        row = runs.reader * self._all_rows + runs.start
        at = np.searchsorted(self._firsts, row, side="right") - 1
        row -= self._firsts[at]
        place = runs.line * self.rows[0].shape[1] + runs.column
        run, left, pieces = np.arange(len(at)), runs.num_rows, []
        while True:
            chunk, inner = np.divmod(row, self._chunk_rows[at])
            end = np.minimum(self._chunk_rows[at] - inner, self._num_rows[at] - row)
            num_rows = np.minimum(left, end)
            pieces.append((run, at, chunk, inner, num_rows, place))
            more = np.flatnonzero(left > num_rows)
            if not len(more):
                return tuple(np.concatenate(values) for values in zip(*pieces, strict=True))
            run, at, place = run[more], at[more], place[more] + num_rows[more]
            row, left = row[more] + num_rows[more], left[more] - num_rows[more]
            is_next = row == self._num_rows[at]
            at, row = at + is_next, np.where(is_next, 0, row)

    def _queue(self) -> Queue | None:
        """The thread's own."""
        if not hasattr(self._local, "queue"):
            self._local.queue = open_queue()
        queue: Queue | None = self._local.queue
        return queue
