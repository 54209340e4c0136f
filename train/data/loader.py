"""From the store to batches: threads read slices ahead, each row to its place in a batch."""

from types import TracebackType
from typing import NamedTuple

import torch

from mlsae.store import AnyStore
from mlsae.train.data.decode import StoredParts
from mlsae.train.data.jobs import plan
from mlsae.train.data.mixture import Mixture
from mlsae.train.data.reading import Reading
from mlsae.train.data.window import Window

_THREADS, _THREADS_REMOTE = 2, 8
_JOB_RUNS, _JOB_RUNS_REMOTE = 256, 16


class Batch(NamedTuple):
    """One rank's share of a batch, in reused buffers: good until the next batch is asked for."""

    x: torch.Tensor
    """(n, d_model) as stored; n may be 0."""
    layer: torch.Tensor
    """(n,) int64 index into the layers of the run."""
    num_rows: int
    """Rows of the whole batch, over ranks."""
    more: StoredParts = ()
    """(n, width) for each further part of a stored row, such as the exponents of int8."""
    origin: torch.Tensor | None = None
    """(n,) int64 index into the store's `stores` of each row, where decoding asks for it."""
    lane: torch.Tensor | None = None
    """(n,) int64 lane of each row, on the CPU; None for one lane alone."""

    def part(self, rows: slice | torch.Tensor) -> "Batch":
        """Some rows: a slice, or indices in any order."""

        def taken(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[rows if isinstance(rows, slice) else rows.to(tensor.device)]

        return self._replace(
            x=taken(self.x),
            layer=taken(self.layer),
            more=tuple(taken(part) for part in self.more),
            origin=None if self.origin is None else taken(self.origin),
            lane=None if self.lane is None else taken(self.lane),
        )


def num_threads(store: AnyStore) -> int:
    """Threads that pay for reading slices of a store: more where each read waits for a network."""
    return _THREADS if store.is_local else _THREADS_REMOTE


def job_runs(mixture: Mixture, rank: int, world_size: int) -> int:
    """Slices that a thread reads at once.

    So few that three jobs fit into the read-ahead, for two threads not to wait for each other;
    fewer where each takes long, so that all threads read.
    """
    most = _JOB_RUNS if mixture.store.is_local else _JOB_RUNS_REMOTE
    rows_ahead = mixture.num_ahead * mixture.rank_rows(rank, world_size)
    return max(1, min(most, rows_ahead // (3 * mixture.slice_rows)))


class Loader:
    """Batches of one rank, in the order of the mixture.

    A context manager: leaving it ends the threads. Errors in a thread are raised by `next`.

    Args:
        mixture: the rows and their order.
        start: first step, counted over epochs.
        stop: step before which to end.
        rank: rank of this process.
        world_size: number of ranks.
        pin: put batches in page-locked memory, for a faster way to a GPU.
        threads: number of reading threads; None for as many as pay. Batches do not depend on it.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        start: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        threads: int | None = None,
    ) -> None:
        self._window = Window(mixture, rank, world_size, pin=pin)
        self._reading = Reading(
            plan(mixture, start, stop, rank, world_size, job_runs(mixture, rank, world_size)),
            self._window.read,
            num_threads=threads or num_threads(mixture.store),
            num_batches=mixture.num_batches,
            start=start,
        )

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        share = self._reading.next()
        if share is None:
            raise StopIteration
        (x, *more), layer, origin = self._window.batch(share)
        lane = torch.from_numpy(share.lane)
        return Batch(x, layer, share.num_rows, tuple(more), origin, lane)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reading.stop()
        self._window.close()
