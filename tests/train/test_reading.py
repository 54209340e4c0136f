"""Threads read and cut all there is, nothing before its place is free, and steps in order."""

import os
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mlsae.store.runs import Runs
from mlsae.train.jobs import Job, Planned, Share
from mlsae.train.reading import NICENESS, Reading

NOTHING = np.zeros(0, np.int64)
PLACES = 4
"""For batches."""
HELD = 5
"""Steps for which what a step reads is needed: its jobs wait for the cut before those."""


def plan_of(steps: int) -> Iterator[Planned]:
    """None to two jobs that begin with a step, in lists of up to seven; a run's reader is it."""
    shares: list[Share] = []
    jobs: list[Job] = []
    for step in range(steps):
        shares.append(Share(step, 1, num_jobs(step), NOTHING))
        runs = Runs(*[np.array([step])] * 5)
        jobs += [Job(shares[-1], step - HELD, runs)] * num_jobs(step)
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
        self.cut: list[int] = []
        self.asked = -1
        """The step that the consumer was the last to ask for."""
        self.early: list[tuple[str, int]] = []

    def do_read(self, runs: Runs) -> None:
        """No line is read over before the step that needs it last was cut."""
        with self.changed:
            step = int(runs.reader[0])
            if not set(range(step - HELD + 1)) <= set(self.cut):
                self.early.append(("read", step))
            self.read.append(step)
            self.changed.notify_all()

    def do_cut(self, share: Share) -> None:
        """No step is cut before it was read, nor to a batch that is in use."""
        with self.changed:
            steps = range(share.step + 1)
            if any(self.read.count(step) < num_jobs(step) for step in steps[-9:]):
                self.early.append(("cut", share.step))
            if share.step - PLACES >= self.asked:
                self.early.append(("in use", share.step))
            self.cut.append(share.step)
            self.changed.notify_all()


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_steps_come_in_order_and_nothing_is_used_too_early(num_threads: int) -> None:
    """And all that may be done ahead is, while the consumer is at a step."""
    watch = Watch()
    reading = Reading(
        plan_of(300),
        watch.do_read,
        watch.do_cut,
        num_threads=num_threads,
        num_batches=PLACES,
        start=0,
    )
    for step in range(300):
        with watch.changed:
            watch.asked = step
        share = reading.next()
        assert share is not None
        assert share.step == step
        with watch.changed:
            ahead = min(300, step + PLACES)
            assert watch.changed.wait_for(lambda n=ahead: len(watch.cut) == n, timeout=60)
            read = sum(num_jobs(s) for s in range(min(300, ahead + HELD)))
            assert watch.changed.wait_for(lambda n=read: len(watch.read) == n, timeout=60)
    assert reading.next() is None
    assert reading.next() is None
    reading.stop()
    assert watch.early == []
    assert sorted(watch.cut) == list(range(300))


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("where", ["read", "cut"])
def test_an_error_comes_in_place_of_the_step_that_it_spoilt(num_threads: int, where: str) -> None:
    """Never lost, and what was complete before comes first; asking again raises it again."""

    def fail(name: str, step: int) -> None:
        if name == where and step == 7:
            raise OSError("no more")

    reading = Reading(
        plan_of(500),
        lambda runs: fail("read", int(runs.reader[0])),
        lambda share: fail("cut", share.step),
        num_threads=num_threads,
        num_batches=PLACES,
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

    def do(_: Runs | Share) -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    reading = Reading(plan_of(20), do, do, num_threads=2, num_batches=PLACES, start=0)
    take_all(reading, [])
    reading.stop()
    assert set(found) == {max(before, NICENESS)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_an_error_of_the_plan_comes_too() -> None:
    """What goes wrong while the next job is made is raised as well."""

    def broken() -> Iterator[Planned]:
        yield from plan_of(5)
        raise ValueError("no plan")

    nothing: Callable[[object], None] = lambda _: None  # noqa: E731
    reading = Reading(broken(), nothing, nothing, num_threads=2, num_batches=PLACES, start=0)
    steps: list[int] = []
    with pytest.raises(ValueError, match="no plan"):
        take_all(reading, steps)
    assert steps == list(range(len(steps)))
    reading.stop()
