"""Threads read all there is, nothing before its place is free, and give steps in order."""

import os
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mlsae.base.machine.priority import NICENESS
from mlsae.store.read.scatter import Runs
from mlsae.train.data.jobs import Job, Planned, Share
from mlsae.train.data.reading import Reading

NOTHING = np.zeros(0, np.int64)
BATCHES = 9
"""In memory."""
SPREAD = 5
"""Steps beyond its first that a job reads for."""


def plan_of(steps: int) -> Iterator[Planned]:
    """None to two jobs that begin with a step, in lists of up to seven; a run's reader is it."""
    shares: list[Share] = []
    jobs: list[Job] = []
    for step in range(steps):
        shares.append(Share(step, 1, num_jobs(step), NOTHING, NOTHING))
        runs = Runs(*[np.array([step])] * 3, np.zeros((1, 1), np.int64))
        jobs += [Job(shares[-1], step + SPREAD, runs)] * num_jobs(step)
        if step % 7 == 6:
            yield Planned(shares, jobs)
            shares, jobs = [], []
    yield Planned(shares, jobs)


def num_jobs(step: int) -> int:
    return (step + 1) % 3


def take_all(reading: Reading, steps: list[int]) -> None:
    while (share := reading.next()) is not None:
        steps.append(share.step)


class Watch:
    """Threads that watch what is done, and when."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.read: list[int] = []
        self.asked = -1
        """The step that the consumer was the last to ask for."""
        self.early: list[int] = []

    def do_read(self, runs: Runs) -> None:
        """No batch is read to before the step that had it was given back."""
        with self.changed:
            step = int(runs.reader[0])
            if step + SPREAD - BATCHES >= self.asked:
                self.early.append(step)
            self.read.append(step)
            self.changed.notify_all()


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_steps_come_in_order_and_nothing_is_used_too_early(num_threads: int) -> None:
    """And all that may be done ahead is, while the consumer is at a step."""
    watch = Watch()
    reading = Reading(
        plan_of(300),
        watch.do_read,
        num_threads=num_threads,
        num_batches=BATCHES,
        start=0,
    )
    for step in range(300):
        with watch.changed:
            watch.asked = step
        share = reading.next()
        assert share is not None
        assert share.step == step
        with watch.changed:
            # No step is given before it was read.
            assert watch.read.count(step) == num_jobs(step)
            read = sum(num_jobs(s) for s in range(min(300, step + BATCHES - SPREAD)))
            assert watch.changed.wait_for(lambda n=read: len(watch.read) == n, timeout=60)
    assert reading.next() is None
    assert reading.next() is None
    reading.stop()
    assert watch.early == []


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_an_error_comes_in_place_of_the_step_that_it_spoilt(num_threads: int) -> None:
    """Never lost, and what was complete before comes first; asking again raises it again."""

    def fail(runs: Runs) -> None:
        if runs.reader[0] == 7:
            raise OSError("no more")

    reading = Reading(
        plan_of(500),
        fail,
        num_threads=num_threads,
        num_batches=BATCHES,
        start=0,
    )
    steps: list[int] = []
    with pytest.raises(OSError, match="no more"):
        take_all(reading, steps)
    assert steps == list(range(len(steps)))
    # Another thread may be at a step before, and ends with what it has read.
    assert len(steps) == 7 if num_threads == 1 else len(steps) <= 7
    with pytest.raises(OSError, match="no more"):
        reading.next()
    reading.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_threads_that_read_let_those_that_compute_go_first() -> None:
    """The priority is theirs alone: the thread that takes batches keeps its own."""
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found: list[int] = []

    def do(_: Runs) -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    reading = Reading(plan_of(20), do, num_threads=2, num_batches=BATCHES, start=0)
    take_all(reading, [])
    reading.stop()
    assert set(found) == {max(before, NICENESS)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_an_error_of_the_plan_comes_too() -> None:
    """Errors raised while the next job is made are raised as well."""

    def broken() -> Iterator[Planned]:
        yield from plan_of(5)
        raise ValueError("no plan")

    nothing: Callable[[object], None] = lambda _: None  # noqa: E731
    reading = Reading(broken(), nothing, num_threads=2, num_batches=BATCHES, start=0)
    steps: list[int] = []
    with pytest.raises(ValueError, match="no plan"):
        take_all(reading, steps)
    assert steps == list(range(len(steps)))
    reading.stop()
