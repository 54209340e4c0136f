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

    def locate(self, start: int, num_rows: int) -> list[tuple[Descriptor, int]] | None:
        """Where rows lie side by side in a file: for each part the file and their first byte."""
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
    """

    def __init__(self, out: Sequence[Array], to: Int64) -> None:
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
        """
        if queue is None:
            self._fill_singly(readers, runs, np.arange(len(runs.reader)))
            return
        most = MOST_READS // len(self._out)
        for first in range(0, len(runs.reader), most):
            some = runs.part(first, first + most)
            self._fill_singly(readers, some, self._fill_at_once(readers, some, queue))

    def _fill_at_once(self, readers: Sequence[Reader], runs: Runs, queue: Queue) -> Int64:
        """Read what can be read by one call; returns the indices of the other runs."""
        taken, files, offsets = [], [], []
        each = zip(*(values.tolist() for values in runs[:3]), strict=True)
        for i, (reader, start, num_rows) in enumerate(each):
            found = readers[reader].locate(start, num_rows)
            if found is not None and num_rows <= MOST_PIECES:
                taken.append(i)
                for file, offset in found:
                    files.append(file)
                    offsets.append(offset)
        if not taken:
            return np.arange(len(runs.reader))
        cell = (runs.line[taken] * self._to.shape[1] + runs.column[taken]) * _PIECE.itemsize
        num_bytes = queue.read(
            [file.number for file in files],
            offsets,
            (cell[:, None] + self._addresses).reshape(-1),
            np.repeat(runs.num_rows[taken], len(self._out)),
        )
        wanted = runs.num_rows[taken][:, None] * self._row_bytes
        is_read = (num_bytes.reshape(wanted.shape) == wanted).all(axis=1)
        # Read again in the usual way, the others say what is wrong.
        return np.setdiff1d(np.arange(len(runs.reader)), np.array(taken)[is_read])

    def _fill_singly(self, readers: Sequence[Reader], runs: Runs, which: Int64) -> None:
        each = zip(*(values[which].tolist() for values in runs), strict=True)
        for reader, start, num_rows, line, column in each:
            parts = readers[reader].parts
            rows = [np.empty((num_rows, part.width), part.dtype) for part in parts]
            readers[reader].read_into(rows, start)
            to = self._to[line, column : column + num_rows]
            for out, values in zip(self._out, rows, strict=True):
                out[to] = values
