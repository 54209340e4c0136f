"""What to read for each step, and where it lies then: settled many steps at a time.

A slice is read when the first of its rows is due, to a line of the window that no step needs any
more, and stays until the last of its rows was cut. Nothing here reads an activation.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlsae.store.runs import Runs
from mlsae.train.rows import Mixture
from mlsae.train.walk import Block, Walk

Int64 = npt.NDArray[np.int64]


@dataclass
class Share:
    """One rank's share of a batch."""

    step: int
    """Counted over epochs."""
    num_rows: int
    """Rows of the whole batch, over ranks."""
    num_jobs: int
    """Jobs that are still to be done of those that begin with this step; may be 0."""
    rows: Int64 = field(repr=False)
    """(n,) where each row of the share lies: line · slice_rows + column; n may be 0."""


class Job(NamedTuple):
    """What one thread reads at once."""

    share: Share
    """The first step that needs some of it."""
    after: int
    """The step that was the last to need what lies in those lines; −1 for none."""
    runs: Runs
    """Readers are those of the layers of the run."""


class Planned(NamedTuple):
    """Some steps, and what to read for them.

    A step can be cut when its jobs and those of all steps before it are done.
    """

    shares: list[Share]
    jobs: list[Job]


def plan(
    mixture: Mixture, start: int, stop: int, rank: int, world_size: int, job_runs: int
) -> Iterator[Planned]:
    """The steps and jobs of a rank, in order.

    Args:
        mixture: the rows and their order.
        start: first step, counted over epochs.
        stop: step before which to end.
        rank: of this process.
        world_size: number of ranks.
        job_runs: most slices of a job.
    """
    lines = _Lines(mixture.rank_lines(rank, world_size))
    while start < stop:
        epoch, first = divmod(start, mixture.epoch_steps)
        walk = Walk(mixture.order(epoch), first, rank, world_size)
        of_epoch = _Epoch(mixture, walk, start - first, lines, job_runs)
        for block in walk:
            if start - first + block.steps.start >= stop:
                return
            shares, jobs = of_epoch.plan(block)
            yield Planned(
                [share for share in shares if share.step < stop],
                [job for job in jobs if job.share.step < stop],
            )
        start += mixture.epoch_steps - first


class _Lines:
    """Which lines of the window are in use, and until when."""

    def __init__(self, num_lines: int) -> None:
        self._closes = np.full(num_lines, -1)

    def take(self, opens: int, closes: Int64) -> tuple[Int64, Int64]:
        """Lines for parts that are opened at a step, those that have been free for longest.

        There are enough: a place needs one part at a time.

        Returns:
            (n,) lines, (n,) step that was the last to need what each holds.
        """
        free = np.flatnonzero(self._closes < opens)
        found = free[np.argsort(self._closes[free])[: len(closes)]]
        after = self._closes[found]
        self._closes[found] = closes
        return found, after


class _Epoch:
    """The jobs of an epoch, block by block."""

    def __init__(
        self, mixture: Mixture, walk: Walk, epoch_start: int, lines: _Lines, job_runs: int
    ) -> None:
        self._mixture, self._walk, self._epoch_start = mixture, walk, epoch_start
        self._lines, self._job_runs = lines, job_runs
        self._first_round = 0
        self._rows = np.zeros((0, max(1, len(walk.layer))), np.int64)
        """(rounds, places) where the row of each place lies, from the first round on."""

    def plan(self, block: Block) -> tuple[list[Share], list[Job]]:
        """The steps and jobs of the next block."""
        opens, closes = block.opens + self._epoch_start, block.closes + self._epoch_start
        line, after = np.empty_like(opens), np.empty_like(opens)
        steps = range(block.steps.start + self._epoch_start, block.steps.stop + self._epoch_start)
        ends = np.searchsorted(opens, np.arange(steps.start, steps.stop) + 1).tolist()
        for step, first, end in zip(steps, [0, *ends], ends, strict=False):
            line[first:end], after[first:end] = self._lines.take(step, closes[first:end])
        runs, rows = _runs(self._mixture, self._walk, block, line)
        self._put(block, rows)
        shares = [
            Share(self._epoch_start + step, self._walk.batch_rows(step), 0, self._share(step))
            for step in block.steps
        ]
        jobs, first = [], 0
        while first < len(opens):
            # What lies there must not be what the job's own steps wait for.
            some = slice(first, first + self._job_runs)
            too_late = np.flatnonzero(after[some] >= opens[first])
            stop = first + int(too_late[0]) if len(too_late) else min(some.stop, len(opens))
            share = shares[int(opens[first]) - steps.start]
            share.num_jobs += 1
            jobs.append(Job(share, int(after[first:stop].max()), runs.part(first, stop)))
            first = stop
        return shares, jobs

    def _put(self, block: Block, rows: Int64) -> None:
        """Note where the rows of a block's parts lie, and forget the rounds before the block."""
        _, places = self._rows.shape
        first = self._walk.share(block.steps.start).start // places
        first = min(first, int(block.round.min(initial=first)))
        beyond = int(block.round.max(initial=first)) + rows.shape[1]
        beyond = max(beyond, self._first_round + len(self._rows))
        kept = self._rows[first - self._first_round :]
        self._rows = np.empty((beyond - first, places), np.int64)
        self._rows[: len(kept)] = kept
        self._first_round = first
        at = (block.round - first)[:, None] + np.arange(rows.shape[1])
        at *= places
        at += block.place[:, None]
        # Beyond its rows a part means nothing: what is written there, the next part of the place
        # writes over, which comes later.
        self._rows.reshape(-1)[at.reshape(-1)] = rows.reshape(-1)

    def _share(self, step: int) -> Int64:
        share, before = self._walk.share(step), self._first_round * self._rows.shape[1]
        return self._rows.reshape(-1)[share.start - before : share.stop - before].copy()


def _runs(mixture: Mixture, walk: Walk, block: Block, line: Int64) -> tuple[Runs, Int64]:
    """The runs of rows of a block's parts, and (n, width) where each row will lie."""
    parts, size = block.parts, mixture.slice_rows
    row = walk.order.part_order(parts)
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
    runs = Runs(parts.layer, starts + first, last + 1 - first, line, first)
    row += line[:, None] * size
    return runs, row
