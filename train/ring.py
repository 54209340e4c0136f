"""The memory of a loader: a ring of batches, the next few of which are being filled, row by row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.store.encoding import Part
from mlsae.train.decode import Parts, origin_of, torch_rows
from mlsae.train.rows import Mixture


class Ring:
    """Batches of one rank, reused in turn.

    Args:
        mixture: the rows and their order.
        rank: of the process.
        world_size: number of ranks.
        pin: lock the memory's pages, so that a GPU can copy from it by itself.
    """

    def __init__(self, mixture: Mixture, rank: int, world_size: int, *, pin: bool = False) -> None:
        self.num_batches = mixture.ring_batches
        self.batch_rows = mixture.rank_rows(rank, world_size)
        self.nowhere = self.num_batches * self.batch_rows
        """Where rows go that belong to no batch."""
        parts: Sequence[Part] = mixture.store.parts
        self.arrays: list[npt.NDArray[Any]] = [
            np.empty((self.nowhere + 1, part.width), part.dtype) for part in parts
        ]
        """(num_batches · batch_rows + 1, width) for each part of a row, batch after batch."""
        self.layer = np.zeros(self.nowhere + 1, np.int64)
        """(num_batches · batch_rows + 1,) index into the layers of the run of each row."""
        # None where decoding does not ask for it.
        self.origin = origin_of(mixture.store, np.zeros(self.nowhere + 1, np.int64))
        """(num_batches · batch_rows + 1,) which of the store's `stores` each row is of."""
        self._rows = [torch_rows(rows, mixture.store.encoding) for rows in self.arrays]
        self._pinned = [rows for rows in self.arrays if pin and _pin(rows)]

    def close(self) -> None:
        """Unlock the memory."""
        while self._pinned:
            _cuda_runtime().cudaHostUnregister(self._pinned.pop().ctypes.data)

    def batch(self, step: int, num_rows: int) -> tuple[Parts, torch.Tensor, torch.Tensor | None]:
        """The first rows of the batch of a step, and what `layer` and `origin` say of them."""
        start = step % self.num_batches * self.batch_rows
        here = slice(start, start + num_rows)
        origin = None if self.origin is None else torch.from_numpy(self.origin[here])
        return tuple(rows[here] for rows in self._rows), torch.from_numpy(self.layer[here]), origin


def _pin(rows: npt.NDArray[Any]) -> bool:
    """Lock the pages of an array; False if the system does not let us.

    torch's own pinned memory comes in powers of two, which could double a ring.
    """
    portable = 1
    return int(_cuda_runtime().cudaHostRegister(rows.ctypes.data, rows.nbytes, portable)) == 0


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
