"""Many runs of neighbouring rows, read by one call.

A reader that mixes rows asks for tens of thousands of short runs a second, and each read by itself
would cost more than its bytes. What cannot be read so (compressed and remote chunks, chunks that
were not checked before, systems without such a call) is read run by run, to the same places.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mlsae.store.aio import MOST_READS, open_queue
from mlsae.store.encoding import Part
from mlsae.store.objects import Descriptor

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]


class Reader(Protocol):
    """Rows of one site and layer."""

    parts: tuple[Part, ...]

    def read_into(self, out: Sequence[Array], start: int) -> None:
        """Fill arrays with the rows from `start` on."""
        ...

    def locate(self, start: int, num_rows: int) -> list[tuple[Descriptor, int, int]] | None:
        """For each part a file, the first byte, and how many rows from `start` on lie there."""
        ...


class Runs(NamedTuple):
    """Runs of neighbouring rows; arrays of one length."""

    reader: Int64
    """Index of the reader."""
    start: Int64
    """First row."""
    num_rows: Int64
    column: Int64
    """Of the run's line, where the first row goes; the others follow."""

    def part(self, first: int, stop: int) -> "Runs":
        """Some of them."""
        return Runs(*(values[first:stop] for values in self))


class Lines:
    """Memory that runs are read into, each to a line of its own; for one thread at a time.

    Args:
        parts: of a row.
        num_lines: runs that are read at once.
        num_columns: rows that a line holds.
    """

    def __init__(self, parts: Sequence[Part], num_lines: int, num_columns: int) -> None:
        self.rows: list[Array] = [
            np.zeros((num_lines, num_columns, part.width), part.dtype) for part in parts
        ]
        """(num_lines, num_columns, width) for each part of a row."""
        self._queue = open_queue()
        self._row_bytes = [rows.shape[2] * rows.itemsize for rows in self.rows]
        self._addresses = [rows.ctypes.data for rows in self.rows]

    def read(self, readers: Sequence[Reader], runs: Runs) -> None:
        """Read run i to line i.

        Args:
            readers: as the runs count them.
            runs: of rows, no more than there are lines.

        Raises:
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
            IndexError: a run is longer than its line. The kernel would write beyond it.
        """
        num_lines, num_columns, _ = self.rows[0].shape
        ends = runs.column + runs.num_rows
        if len(ends) > num_lines or not ((runs.column >= 0) & (ends <= num_columns)).all():
            raise IndexError(f"runs do not fit into {num_lines} lines of {num_columns} rows")
        pieces: list[tuple[int, int, int, int]] = []
        reads: list[tuple[Descriptor, int, int, int]] = []
        each = zip(*(values.tolist() for values in runs), strict=True)
        for line, (reader, start, left, column) in enumerate(each):
            at = line * num_columns + column
            while left:
                found = None if self._queue is None else readers[reader].locate(start, left)
                if found is None:
                    self._read(readers[reader], start, left, at)
                    break
                count = found[0][2]
                for (file, offset, _), address, size in zip(
                    found, self._addresses, self._row_bytes, strict=True
                ):
                    reads.append((file, offset, address + at * size, count * size))
                pieces.append((reader, start, count, at))
                start, left, at = start + count, left - count, at + count
        for piece, complete in zip(pieces, self._submit(reads), strict=True):
            # Read again in the usual way, the others say what is wrong.
            if not complete:
                reader, start, count, at = piece
                self._read(readers[reader], start, count, at)

    def _submit(self, reads: list[tuple[Descriptor, int, int, int]]) -> list[bool]:
        """Whether all reads of each piece gave all they were asked for."""
        complete: list[bool] = []
        most = MOST_READS // len(self.rows) * len(self.rows)
        for first in range(0, len(reads), most):
            assert self._queue is not None
            files, offsets, addresses, sizes = zip(*reads[first : first + most], strict=True)
            numbers = [file.number for file in files]
            found = self._queue.read(numbers, offsets, addresses, sizes) == sizes
            complete += found.reshape(-1, len(self.rows)).all(axis=1).tolist()
        return complete

    def _read(self, reader: Reader, start: int, num_rows: int, at: int) -> None:
        flat = (rows.reshape(-1, rows.shape[2]) for rows in self.rows)
        reader.read_into([rows[at : at + num_rows] for rows in flat], start)
