"""A loader's memory: the batches that rows are read to, reused in turn."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.store.read.scatter import Runs, ScatteredRows
from mlsae.train.data.decode import StoredParts, origin_of, torch_rows
from mlsae.train.data.jobs import Share
from mlsae.train.data.mixture import Mixture


class Window:
    """One rank's batches. Several threads may read at once.

    Args:
        mixture: the rows and their order.
        rank: the process's rank.
        world_size: number of ranks.
        pin: lock their pages, so that a GPU can copy from them by itself.
    """

    def __init__(self, mixture: Mixture, rank: int, world_size: int, *, pin: bool = False) -> None:
        store = mixture.store
        self._num_batches = mixture.num_batches
        self._batch_rows = mixture.rank_rows(rank, world_size)
        readers = [store.reader(mixture.site, layer) for layer in mixture.layers]
        num_rows = self._num_batches * self._batch_rows
        self._rows = ScatteredRows(readers, num_rows)
        self._tensors = [torch_rows(rows, store.encoding) for rows in self._rows.rows]
        self._row_origin = store.row_origin
        # (num_rows + 1,); None where decoding does not ask for it.
        self._origin = origin_of(store, np.zeros(num_rows + 1, np.int64))
        self._pinned = [rows for rows in self._rows.rows if pin and _pin(rows)]

    @property
    def num_bytes(self) -> int:
        """Bytes for activations that it holds."""
        return sum(rows.nbytes for rows in self._rows.rows)

    def close(self) -> None:
        """Unlock the memory."""
        while self._pinned:
            _cuda_runtime().cudaHostUnregister(self._pinned.pop().ctypes.data)

    def read(self, runs: Runs) -> None:
        """Read slices, each row to its place.

        Args:
            runs: readers are those for the mixture's layers.

        Raises:
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        self._rows.read(runs)
        if self._origin is not None:
            for start, num_rows, place in zip(runs.start, runs.num_rows, runs.place, strict=True):
                origin = self._row_origin(np.arange(start, start + num_rows))
                self._origin[place[:num_rows]] = origin

    def batch(self, share: Share) -> tuple[StoredParts, torch.Tensor, torch.Tensor | None]:
        """The rows that were read for a step, each one's layer and, if asked for, its origin."""
        start = share.step % self._num_batches * self._batch_rows
        here = slice(start, start + len(share.layer))
        return (
            tuple(rows[here] for rows in self._tensors),
            torch.from_numpy(share.layer),
            None if self._origin is None else torch.from_numpy(self._origin[here]),
        )


def _pin(rows: npt.NDArray[Any]) -> bool:
    """Lock an array's pages; False if the system does not let us.

    torch's own pinned memory comes in powers of two, which could double it.
    """
    portable = 1
    return int(_cuda_runtime().cudaHostRegister(rows.ctypes.data, rows.nbytes, portable)) == 0


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
