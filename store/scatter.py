"""Many runs of rows, each row read straight to a place of its own.

A reader that mixes rows would otherwise copy everything twice: out of the page cache, and then to
where it belongs. Here the kernel copies each row from its page to its place, by one call for many
runs. What cannot be read so (compressed and remote chunks, chunks that were not checked before,
runs over the border of two, systems without such a call) is read as usual and put in its places.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mlsae.store.aio import MOST_PIECES, MOST_READS, Queue
from mlsae.store.encoding import Part
from mlsae.store.objects import Descriptor

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]

_PIECE = np.dtype([("address", "<u8"), ("num_bytes", "<u8")])
"""struct iovec."""


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
    """Runs of neighbouring rows, and where a table says that they go; arrays of one length."""

    reader: Int64
    """Index of the reader."""
    start: Int64
    """First row."""
    num_rows: Int64
    line: Int64
    """Of the table."""
    column: Int64
    """Of the first row; the others follow."""

    def part(self, first: int, stop: int) -> "Runs":
        """Some of them."""
        return Runs(*(values[first:stop] for values in self))


class Places:
    """A table of places for rows.

    Args:
        out: for each part of a row the memory, (num_places, width), C-contiguous.
        to: (lines, columns) int64, the place of each row; kept, and not to be changed.

    Raises:
        IndexError: there is no such place. The kernel would write elsewhere in our memory.
    """

    def __init__(self, out: Sequence[Array], to: Int64) -> None:
        num_places = min((len(rows) for rows in out), default=0)
        if to.size and not 0 <= to.min() <= to.max() < num_places:
            raise IndexError(f"places {to.min()} to {to.max()} are not in 0 to {num_places - 1}")
        self._out, self._to = out, to
        self._row_bytes = np.array([rows.shape[1] * rows.itemsize for rows in out])
        self._pieces = [np.empty(to.shape, _PIECE) for _ in out]
        self._addresses = np.array([pieces.ctypes.data for pieces in self._pieces])
        for pieces, rows in zip(self._pieces, out, strict=True):
            row_bytes = rows.shape[1] * rows.itemsize
            np.multiply(to, row_bytes, out=pieces["address"], casting="unsafe")
            pieces["address"] += np.uint64(rows.ctypes.data)
            pieces["num_bytes"] = row_bytes

    def fill(self, readers: Sequence[Reader], runs: Runs, queue: Queue | None) -> None:
        """Read runs to their places.

        Args:
            readers: as the runs count them.
            runs: of rows; several may share a line.
            queue: of this thread; None to read run by run.

        Raises:
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
            IndexError: a run is not within its line.
        """
        lines, columns = self._to.shape
        ends = runs.column + runs.num_rows
        if not ((ends <= columns) & (runs.column >= 0) & (runs.line < lines)).all():
            raise IndexError(f"a run is not within a line of a table of {lines} × {columns}")
        pieces: list[tuple[int, int, int, int]] = []
        files: list[Descriptor] = []
        offsets: list[int] = []
        each = zip(*(values.tolist() for values in runs), strict=True)
        for reader, start, num_rows, line, column in each:
            entry, left = line * columns + column, num_rows
            while left:
                most = min(left, MOST_PIECES)
                found = None if queue is None else readers[reader].locate(start, most)
                if found is None:
                    self._copy(readers[reader], start, left, entry)
                    break
                for file, offset, _ in found:
                    files.append(file)
                    offsets.append(offset)
                count = found[0][2]
                pieces.append((reader, start, count, entry))
                start, left, entry = start + count, left - count, entry + count
        if queue is None:
            return
        num_parts = len(self._out)
        most = MOST_READS // num_parts
        for first in range(0, len(pieces), most):
            here = slice(first * num_parts, (first + most) * num_parts)
            some = pieces[first : first + most]
            self._read(readers, some, files[here], offsets[here], queue)

    def _read(
        self,
        readers: Sequence[Reader],
        pieces: list[tuple[int, int, int, int]],
        files: list[Descriptor],
        offsets: list[int],
        queue: Queue,
    ) -> None:
        """Read pieces that lie side by side in files, by one call."""
        _, _, num_rows, entry = np.array(pieces).T
        read = queue.read(
            [file.number for file in files],
            offsets,
            (entry[:, None] * _PIECE.itemsize + self._addresses).reshape(-1),
            np.repeat(num_rows, len(self._out)),
        )
        is_read = (read.reshape(len(pieces), -1) == num_rows[:, None] * self._row_bytes).all(axis=1)
        # Read again in the usual way, the others say what is wrong.
        for i in np.flatnonzero(~is_read).tolist():
            reader, start, count, first = pieces[i]
            self._copy(readers[reader], start, count, first)

    def _copy(self, reader: Reader, start: int, num_rows: int, entry: int) -> None:
        """Read rows as usual and put them in their places."""
        rows = [np.empty((num_rows, part.width), part.dtype) for part in reader.parts]
        reader.read_into(rows, start)
        to = self._to.reshape(-1)[entry : entry + num_rows]
        for out, values in zip(self._out, rows, strict=True):
            out[to] = values
