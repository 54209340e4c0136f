"""Threads do every job, none before its place is free, and steps come in order."""

import os
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from mlsae.store.runs import Runs
from mlsae.train.jobs import Job, Share
from mlsae.train.reading import NICENESS, Reading

NOTHING = np.zeros(0, np.int64)
RING = 4


def jobs_of(steps: int) -> Iterator[Job]:
    """One to three jobs a step, which fill batches up to three steps ahead."""
    for step in range(steps):
        share = Share(step, 1, 0, 1 + step % 3)
        for _ in range(share.num_jobs):
            yield Job(share, step + 3 - RING - 1, Runs(*[NOTHING] * 4), NOTHING)


def take_all(reading: Reading, steps: list[int]) -> None:
    while (share := reading.next()) is not None:
        steps.append(share.step)


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_steps_come_in_order_and_no_batch_is_filled_while_in_use(num_threads: int) -> None:
    """A job may write to a batch again once the one after it was asked for, and no sooner."""
    done: list[Job] = []
    changed = threading.Condition()
    released = -1
    early: list[int] = []

    def do(job: Job) -> None:
        with changed:
            done.append(job)
            if job.after > released:
                early.append(job.share.step)
            changed.notify_all()

    every = list(jobs_of(300))
    reading = Reading(iter(every), do, num_threads, 0)
    for step in range(300):
        released = step - 1
        share = reading.next()
        assert share is not None
        assert share.step == step
        with changed:
            assert sum(job.share.step <= step for job in done) == sum(
                job.share.step <= step for job in every
            )
            # All that may be done by now is, and the threads have had the time for more.
            allowed = sum(job.after <= released for job in every)
            assert changed.wait_for(lambda allowed=allowed: len(done) >= allowed, timeout=60)
    assert reading.next() is None
    reading.stop()
    assert early == []
    assert sorted(job.share.step for job in done) == [job.share.step for job in every]


@pytest.mark.parametrize("num_threads", [1, 2, 8])
def test_an_error_comes_in_place_of_the_step_that_it_spoilt(num_threads: int) -> None:
    """Never lost, never before the thread's own earlier steps; asking again raises it again."""

    def do(job: Job) -> None:
        if job.share.step == 7:
            raise OSError("no more")

    reading = Reading(jobs_of(500), do, num_threads, 0)
    steps: list[int] = []
    with pytest.raises(OSError, match="no more"):
        take_all(reading, steps)
    assert steps == list(range(len(steps)))
    assert len(steps) == 7 if num_threads == 1 else len(steps) <= 7
    with pytest.raises(OSError, match="no more"):
        reading.next()
    reading.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_threads_that_read_let_those_that_compute_go_first() -> None:
    """The priority is theirs alone: the thread that takes batches keeps its own."""
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found: list[int] = []

    def do(_: Job) -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    reading = Reading(jobs_of(20), do, 2, 0)
    take_all(reading, [])
    reading.stop()
    assert set(found) == {max(before, NICENESS)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_an_error_of_the_plan_comes_too() -> None:
    """What goes wrong while the next job is made is raised as well."""

    def broken() -> Iterator[Job]:
        yield from jobs_of(5)
        raise ValueError("no plan")

    reading = Reading(broken(), lambda _: None, 2, 0)
    with pytest.raises(ValueError, match="no plan"):
        take_all(reading, [])
    reading.stop()
