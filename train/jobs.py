"""What to read for each step, and where each row goes: settled many steps at a time.

A slice is read when the first of its rows is due, and its rows are put into as many batches as it
has rows. Nothing here reads an activation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlsae.store.runs import Runs
from mlsae.train.ring import Ring
from mlsae.train.rows import Mixture
from mlsae.train.sampler import Order
from mlsae.train.walk import Block, Walk

Int64 = npt.NDArray[np.int64]

JOB_RUNS = 128
"""Most slices that one thread reads at once."""


@dataclass
class Share:
    """One rank's share of a batch."""

    step: int
    """Counted over epochs."""
    num_rows: int
    """Rows of the whole batch, over ranks."""
    num_mine: int
    """Rows of the rank's share; may be 0."""
    num_jobs: int
    """Jobs of this step that are still to be done."""


class Job(NamedTuple):
    """What one thread reads at once."""

    share: Share
    """The step that needs them first."""
    after: int
    """The step whose batch must not be in use any more, nor any before it."""
    runs: Runs
    """Readers are those of the layers of the run."""
    to: Int64
    """(runs, slice_rows) place in the ring of each row of their lines."""


def jobs(
    mixture: Mixture, ring: Ring, start: int, stop: int, rank: int, world_size: int
) -> Iterator[Job]:
    """The jobs of a rank, step by step, at least one for each step.

    A step's batch is complete when its jobs and those of all steps before it are done.

    Args:
        mixture: the rows and their order.
        ring: of the rank.
        start: first step, counted over epochs.
        stop: step before which to end.
        rank: of this process.
        world_size: number of ranks.
    """
    while start < stop:
        epoch, first = divmod(start, mixture.epoch_steps)
        walk = Walk(mixture.order(epoch), first, rank, world_size)
        for block in walk:
            for job in _block_jobs(mixture, ring, walk, block, start - first):
                if job.share.step == stop:
                    return
                yield job
        start += mixture.epoch_steps - first


def _block_jobs(
    mixture: Mixture, ring: Ring, walk: Walk, block: Block, epoch_start: int
) -> Iterator[Job]:
    runs, to = _runs(mixture, ring, walk.order, block, epoch_start)
    ends = np.searchsorted(block.opens, np.arange(block.steps.start, block.steps.stop) + 1)
    closes = block.closes + epoch_start
    first = 0
    for step, end in zip(block.steps, ends.tolist(), strict=True):
        num_jobs = max(1, -(-(end - first) // JOB_RUNS))
        share = Share(epoch_start + step, walk.batch_rows(step), walk.share_rows(step), num_jobs)
        for begin in range(first, max(end, first + 1), JOB_RUNS):
            stop = min(begin + JOB_RUNS, end)
            last = int(closes[begin:stop].max(initial=share.step))
            yield Job(share, last - ring.num_batches, runs.part(begin, stop), to[begin:stop])
        first = end


def _runs(
    mixture: Mixture, ring: Ring, order: Order, block: Block, epoch_start: int
) -> tuple[Runs, Int64]:
    """The runs of rows of a block's parts, and (n, slice_rows) where they go."""
    parts, size = block.parts, mixture.slice_rows
    row = order.part_order(parts)
    starts = parts.slice * size
    first, last = parts.first.copy(), parts.first + parts.num_rows - 1
    counts = mixture.counts[parts.slice].astype(np.int64)
    gaps = np.flatnonzero(counts < np.minimum(size, mixture.store.num_rows - starts))
    if len(gaps):
        places = mixture.rows.places(parts.slice[gaps], counts[gaps], size)
        row[gaps] = np.take_along_axis(places, np.minimum(row[gaps], size - 1), axis=1)
        each = np.arange(len(gaps))
        first[gaps], last[gaps] = places[each, first[gaps]], places[each, last[gaps]]
    at = (block.step + epoch_start) % ring.num_batches * ring.batch_rows + block.position
    # What is no row of the part goes to a column of its own.
    row[block.step < 0] = size
    line = np.arange(len(starts))[:, None]
    to = np.full((len(starts), size + 1), ring.nowhere)
    to.reshape(-1)[row + line * (size + 1)] = at
    return Runs(parts.layer, starts + first, last + 1 - first, first), to[:, :size]
