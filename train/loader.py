"""From the store to batches: one thread reads slices, one cuts batches, both ahead of training."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mlsae.train.prefetch import Prefetch
from mlsae.train.rows import Mixture, num_buffers
from mlsae.train.sampler import Parts
from mlsae.train.window import Window, WindowClosedError

_READ_AHEAD = 8
"""Batches whose slices may be in memory before they are cut; free buffers bound it too."""
_CUT_AHEAD = 2
TORCH_DTYPE = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""Encoding of a store → dtype of a batch; it widens on the device."""


class Batch(NamedTuple):
    """One rank's share of a batch, in reused buffers: good until the next batch is asked for."""

    x: torch.Tensor
    """(n, d_model) as stored; n may be 0."""
    layer: torch.Tensor
    """(n,) int64 index into the layers of the run."""
    num_rows: int
    """Rows of the whole batch, over ranks."""


@dataclass(frozen=True)
class _Filled:
    """A batch all of whose slices are in the window."""

    step: int
    num_rows: int
    layer: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]
    """(n,) rows of the window."""


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
    ) -> None:
        self._mixture = mixture
        store, layers = mixture.store, mixture.layers
        self._readers = [store.reader(mixture.site, layer) for layer in layers]
        mine = mixture.rank_slots(rank, world_size)
        self._window = Window(
            num_buffers(mine), mixture.slice_rows, store.d_model, store.parts[0].dtype
        )
        dtype = TORCH_DTYPE[store.encoding]
        shape = (max(mine, 1), store.d_model)
        # One with the consumer, one being written, the rest waiting.
        self._ring = [
            torch.empty(shape, dtype=dtype, pin_memory=pin) for _ in range(_CUT_AHEAD + 2)
        ]
        self._filled = Prefetch(
            self._read(start, stop, rank, world_size), _READ_AHEAD, "mlsae-read"
        )
        self._batches = Prefetch(self._cut(), _CUT_AHEAD, "mlsae-cut")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._window.close()
        self._filled.stop()
        self._batches.stop()
        self._filled.join()
        self._batches.join()

    def _read(self, start: int, stop: int, rank: int, world_size: int) -> Iterator[_Filled]:
        mixture = self._mixture
        buffer_of = np.full((len(mixture.layers), mixture.num_slots), -1)
        turns = np.empty((len(self._window.buffers), mixture.slice_rows), np.int32)
        number = start
        while number < stop:
            epoch, first = divmod(number, mixture.epoch_steps)
            order = mixture.order(epoch)
            for step in order.walk(first, rank, world_size):
                parts = step.opened
                if step.number == first:
                    old = buffer_of[buffer_of >= 0].tolist()
                    buffer_of[:] = -1
                else:
                    found = buffer_of[parts.layer, parts.slot]
                    old = found[found >= 0].tolist()
                try:
                    buffers = self._window.exchange(number, old, len(parts.slot))
                except WindowClosedError:
                    return
                buffer_of[parts.layer, parts.slot] = buffers
                self._fill(parts, buffers, order.part_order(parts), turns)
                buffer = buffer_of[step.layer, step.slot]
                index = buffer * mixture.slice_rows + turns[buffer, step.turn]
                yield _Filled(number, step.num_rows, step.layer, index)
                number += 1
                if number == stop:
                    return

    def _fill(
        self,
        parts: Parts,
        buffers: npt.NDArray[np.int64],
        order: npt.NDArray[np.int64],
        turns: npt.NDArray[np.int32],
    ) -> None:
        """Read the parts into their buffers, and note where each turn's row lies there."""
        size = self._mixture.slice_rows
        num_rows = self._mixture.store.num_rows
        columns = zip(*(column.tolist() for column in (*parts, buffers)), strict=True)
        for i, (layer, _, slice_, first, count, buffer) in enumerate(columns):
            start = slice_ * size
            stop = min(start + size, num_rows)
            row = order[i, :count]
            if int(self._mixture.counts[slice_]) < stop - start:
                within = np.flatnonzero(self._mixture.rows.mask(start, stop))
                row = within[row]
                first, last = int(within[first]), int(within[first + count - 1])
            else:
                last = first + count - 1
            turns[buffer, :count] = row - first
            out = self._window.buffers[buffer, : last + 1 - first]
            self._readers[layer].read_into([out], start + first)

    def _cut(self) -> Iterator[Batch]:
        numpy_ring: list[npt.NDArray[Any]] = [
            (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy() for x in self._ring
        ]
        for number, filled in enumerate(self._filled):
            place, n = number % len(self._ring), len(filled.index)
            out = numpy_ring[place][:n]
            # mode="clip" lets numpy write into `out` directly; the indices are in range.
            np.take(self._window.rows, filled.index, axis=0, out=out, mode="clip")
            self._window.mark_cut(filled.step)
            yield Batch(self._ring[place][:n], torch.from_numpy(filled.layer), filled.num_rows)
