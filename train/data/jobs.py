"""Reads for each step and their destinations, settled many steps at a time.

A slice is read when its first row is due, and each row goes to its place in the
batch that will hold it. Nothing here reads an activation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlsae.store.read.scatter import Runs
from mlsae.train.data.mixture import Mixture
from mlsae.train.data.walk import StepBlock, Walk

Int64 = npt.NDArray[np.int64]


@dataclass
class Share:
    """One rank's share of a batch."""

    step: int
    """Step number, counted over epochs."""
    num_rows: int
    """Rows in the whole batch, over ranks."""
    num_jobs: int
    """Jobs that begin with this step and are still to be done; may be 0."""
    layer: Int64 = field(repr=False)
    """(n,) index into the layers for each row in the share; n may be 0."""
    lane: Int64 = field(repr=False)
    """(n,) lane of each row."""


class Job(NamedTuple):
    """Rows that one thread reads at once."""

    share: Share
    """First step that needs some row."""
    until: int
    """Last step that needs some row."""
    runs: Runs
    """Rows and their destinations; readers are those for the run's layers."""


class Planned(NamedTuple):
    """Some steps, and the reads that they need.

    A batch is complete when the jobs for its step and for all earlier ones are done.
    """

    shares: list[Share]
    jobs: list[Job]


def plan(
    mixture: Mixture, start: int, stop: int, rank: int, world_size: int, job_runs: int
) -> Iterator[Planned]:
    """A rank's steps and jobs, in order.

    Rows go to `mixture.num_batches` batches in turn, each with as many places as a rank's share may
    have rows; those that no step needs go to the place after all batches.

    Args:
        mixture: the rows and their order.
        start: first step, counted over epochs.
        stop: step before which to end.
        rank: this process's rank.
        world_size: number of ranks.
        job_runs: most slices in a job.
    """
    batch_rows = mixture.rank_rows(rank, world_size)
    while start < stop:
        epoch, first = divmod(start, mixture.epoch_steps)
        walk = Walk(mixture.order(epoch), first, rank, world_size)
        of_epoch = _Epoch(mixture, walk, start - first, batch_rows, job_runs)
        for block in walk:
            if start - first + block.steps.start >= stop:
                return
            shares, jobs = of_epoch.plan(block)
            yield Planned(
                [share for share in shares if share.step < stop],
                [job for job in jobs if job.share.step < stop],
            )
        start += mixture.epoch_steps - first


class _Epoch:
    """An epoch's jobs, block by block."""

    def __init__(
        self, mixture: Mixture, walk: Walk, epoch_start: int, batch_rows: int, job_runs: int
    ) -> None:
        self._mixture, self._walk, self._epoch_start = mixture, walk, epoch_start
        self._batch_rows, self._job_runs = batch_rows, job_runs

    def plan(self, block: StepBlock) -> tuple[list[Share], list[Job]]:
        """Steps and jobs in the next block."""
        walk, steps = self._walk, block.steps
        rows = walk.rows_before(np.arange(steps.start, steps.stop + 1)).tolist()
        shares = [
            Share(
                self._epoch_start + step,
                walk.batch_rows(step),
                0,
                walk.layers(start, stop),
                walk.lanes(start, stop),
            )
            for step, start, stop in zip(steps, rows, rows[1:], strict=False)
        ]
        if not len(block.opens):
            return shares, []
        runs = self._runs(block)
        jobs, first = [], 0
        opens, closes = block.opens.tolist(), block.closes + self._epoch_start
        while first < len(opens):
            share = shares[opens[first] - steps.start]
            # A part that needs a batch which the job's own step must free first is another job's.
            some = slice(first, first + self._job_runs)
            too_late = np.flatnonzero(closes[some] >= share.step + self._mixture.num_batches)
            stop = first + int(too_late[0]) if len(too_late) else min(some.stop, len(opens))
            share.num_jobs += 1
            jobs.append(Job(share, int(closes[first:stop].max()), runs.part(first, stop)))
            first = stop
        return shares, jobs

    def _runs(self, block: StepBlock) -> Runs:
        """Runs of rows in a block's parts, and each row's destination."""
        mixture, parts, size = self._mixture, block.parts, self._mixture.slice_rows
        # (n, width) the row within its slice at each visit.
        row = self._walk.order.part_order(parts)
        starts = parts.slice * size
        first, last = parts.first.copy(), parts.first + parts.num_rows - 1
        counts = mixture.counts[parts.slice].astype(np.int64)
        gaps = np.flatnonzero(counts < np.minimum(size, mixture.store.num_rows - starts))
        if len(gaps):
            places = mixture.rows.places(parts.slice[gaps], counts[gaps], size)
            each = np.arange(len(gaps))
            # Beyond a part's rows are those that mean nothing.
            row[gaps] = places.take(row[gaps] + each[:, None] * size, mode="clip")
            first[gaps], last[gaps] = places[each, first[gaps]], places[each, last[gaps]]
        num_rows = last + 1 - first
        width = int(num_rows.max())
        row += (np.arange(len(row)) * width - first)[:, None]
        beyond = np.arange(row.shape[1]) >= parts.num_rows[:, None]
        np.copyto(row, len(row) * width, where=beyond)
        place = np.full(len(row) * width + 1, mixture.num_batches * self._batch_rows)
        place[row.reshape(-1)] = self._places(block, row.shape[1]).reshape(-1)
        return Runs(parts.layer, starts + first, num_rows, place[:-1].reshape(len(row), width))

    def _places(self, block: StepBlock, width: int) -> Int64:
        """(n, width) destination of the row at each visit to a part."""
        step, row = self._walk.visits(block, width)
        first = int(step.min())
        steps = np.arange(first, int(step.max()) + 1)
        batch = (self._epoch_start + steps) % self._mixture.num_batches
        row += (batch * self._batch_rows - self._walk.rows_before(steps))[step - first]
        if first < self._walk.start:
            nowhere = self._mixture.num_batches * self._batch_rows
            np.copyto(row, nowhere, where=step < self._walk.start)
        return row
