"""From the store to batches: threads read slices and deal their rows to the next batches."""

import threading
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mlsae.store import AnyStore
from mlsae.store.runs import Lines
from mlsae.train.decode import Parts
from mlsae.train.jobs import JOB_RUNS, Job, jobs
from mlsae.train.reading import Reading
from mlsae.train.ring import Ring
from mlsae.train.rows import Mixture

_THREADS, _THREADS_REMOTE = 2, 8


class Batch(NamedTuple):
    """One rank's share of a batch, in reused buffers: good until the next batch is asked for."""

    x: torch.Tensor
    """(n, d_model) as stored; n may be 0."""
    layer: torch.Tensor
    """(n,) int64 index into the layers of the run."""
    num_rows: int
    """Rows of the whole batch, over ranks."""
    more: Parts = ()
    """(n, width) for each further part of a stored row: of int8 the exponents."""
    origin: torch.Tensor | None = None
    """(n,) int64 which of the store's `stores` each row is of, where decoding asks for it."""


def num_threads(store: AnyStore) -> int:
    """Threads that pay for reading slices of a store: more where each read waits for a network."""
    return _THREADS if store.objects.is_local else _THREADS_REMOTE


class Loader:
    """Batches of one rank, in the order of the mixture.

    A context manager: leaving it ends the threads. What goes wrong in a thread is raised by `next`.

    Args:
        mixture: the rows and their order.
        start: first step, counted over epochs.
        stop: step before which to end.
        rank: of this process.
        world_size: number of ranks.
        pin: put batches in page-locked memory, for a faster way to a GPU.
        threads: that read; None for as many as pay. Batches do not depend on it.
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
        self._readers = [mixture.store.reader(mixture.site, layer) for layer in mixture.layers]
        self._parts = mixture.store.parts
        self._row_origin = mixture.store.row_origin
        self._local = threading.local()
        self._ring = Ring(mixture, rank, world_size, pin=pin)
        self._reading = Reading(
            jobs(mixture, self._ring, start, stop, rank, world_size),
            self._read,
            threads or num_threads(mixture.store),
            start,
        )

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        share = self._reading.next()
        if share is None:
            raise StopIteration
        (x, *more), layer, origin = self._ring.batch(share.step, share.num_mine)
        return Batch(x, layer, share.num_rows, tuple(more), origin)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reading.stop()
        self._ring.close()

    def _read(self, job: Job) -> None:
        if not hasattr(self._local, "lines"):
            self._local.lines = Lines(self._parts, JOB_RUNS, job.to.shape[1])
        lines: Lines = self._local.lines
        lines.read(self._readers, job.runs)
        to = job.to.reshape(-1)
        for batches, rows in zip(self._ring.arrays, lines.rows, strict=True):
            _as_items(batches)[to] = _as_items(rows[: len(job.to)]).reshape(-1)
        self._ring.layer[job.to] = job.runs.reader[:, None]
        if self._ring.origin is not None:
            _, *runs = (values.tolist() for values in job.runs)
            for start, num_rows, column, places in zip(*runs, job.to, strict=True):
                origin = self._row_origin(np.arange(start, start + num_rows))
                self._ring.origin[places[column : column + num_rows]] = origin


def _as_items(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A view without the last axis, each row an element: numpy then copies rows as one piece.

    For a row of 512 bytes that takes three quarters of the time, for one of 8 bytes an eighth.
    """
    size = rows.shape[-1] * rows.itemsize
    return rows.view(np.uint64 if size == 8 else f"V{size}")[..., 0]
