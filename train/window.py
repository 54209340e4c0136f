"""The memory of a loader: a window of slices, and a few batches that are cut from it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.store.runs import Lines, Runs
from mlsae.train.decode import Parts, origin_of, torch_rows
from mlsae.train.jobs import Share
from mlsae.train.rows import NUM_BATCHES, Mixture


class Window:
    """Slices of one rank, each in a line, and batches, reused in turn.

    Several threads may read at once, and cut at once what was read.

    Args:
        mixture: the rows and their order.
        rank: of the process.
        world_size: number of ranks.
        pin: lock the batches' pages, so that a GPU can copy from them by itself.
    """

    def __init__(self, mixture: Mixture, rank: int, world_size: int, *, pin: bool = False) -> None:
        store, num_lines = mixture.store, mixture.rank_lines(rank, world_size)
        readers = [store.reader(mixture.site, layer) for layer in mixture.layers]
        self._lines = Lines(readers, num_lines, mixture.slice_rows)
        self._rows = [rows.reshape(-1, rows.shape[2]) for rows in self._lines.rows]
        self._slice_rows = mixture.slice_rows
        self._line_layer = np.zeros(num_lines, np.int64)
        """(num_lines,) index into the layers of the run of what each line holds."""
        self._row_origin = store.row_origin
        # (num_lines, slice_rows); None where decoding does not ask for it.
        self._line_origin = origin_of(store, np.zeros((num_lines, mixture.slice_rows), np.int64))
        self._batch_rows = mixture.rank_rows(rank, world_size)
        batches = NUM_BATCHES * self._batch_rows
        self._batches: list[npt.NDArray[Any]] = [
            np.zeros((batches, part.width), part.dtype) for part in store.parts
        ]
        """(NUM_BATCHES · batch_rows, width) for each part of a row, batch after batch."""
        self._layer = np.zeros(batches, np.int64)
        self._origin = None if self._line_origin is None else np.zeros(batches, np.int64)
        self._tensors = [torch_rows(rows, store.encoding) for rows in self._batches]
        self._pinned = [rows for rows in self._batches if pin and _pin(rows)]

    @property
    def num_bytes(self) -> int:
        """Bytes of activations that it holds."""
        return sum(rows.nbytes for rows in (*self._rows, *self._batches))

    def close(self) -> None:
        """Unlock the memory."""
        while self._pinned:
            _cuda_runtime().cudaHostUnregister(self._pinned.pop().ctypes.data)

    def read(self, runs: Runs) -> None:
        """Read slices to their lines.

        Args:
            runs: readers are those of the layers of the mixture.

        Raises:
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        self._lines.read(runs)
        self._line_layer[runs.line] = runs.reader
        if self._line_origin is not None:
            _, *each = (values.tolist() for values in runs)
            for start, num_rows, line, column in zip(*each, strict=True):
                origin = self._row_origin(np.arange(start, start + num_rows))
                self._line_origin[line, column : column + num_rows] = origin

    def cut(self, share: Share) -> None:
        """Copy the rows of a step's batch side by side."""
        here = self._place(share)
        # Clipping has numpy write to `out` at once; every row is within the window.
        for rows, batches in zip(self._rows, self._batches, strict=True):
            np.take(rows, share.rows, axis=0, out=batches[here], mode="clip")
        np.take(
            self._line_layer, share.rows // self._slice_rows, out=self._layer[here], mode="clip"
        )
        if self._line_origin is not None and self._origin is not None:
            np.take(self._line_origin, share.rows, out=self._origin[here], mode="clip")

    def batch(self, share: Share) -> tuple[Parts, torch.Tensor, torch.Tensor | None]:
        """The rows of a step that was cut, the layer of each and, if asked for, its origin."""
        here = self._place(share)
        origin = None if self._origin is None else torch.from_numpy(self._origin[here])
        return (
            tuple(rows[here] for rows in self._tensors),
            torch.from_numpy(self._layer[here]),
            origin,
        )

    def _place(self, share: Share) -> slice:
        start = share.step % NUM_BATCHES * self._batch_rows
        return slice(start, start + len(share.rows))


def _pin(rows: npt.NDArray[Any]) -> bool:
    """Lock the pages of an array; False if the system does not let us.

    torch's own pinned memory comes in powers of two, which could double it.
    """
    portable = 1
    return int(_cuda_runtime().cudaHostRegister(rows.ctypes.data, rows.nbytes, portable)) == 0


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
