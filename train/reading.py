"""Threads that read ahead and cut batches ahead of the one that takes them."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from mlsae.store.runs import Runs
from mlsae.train.jobs import Job, Planned, Share

NICENESS = 10
"""Of the threads that read: a tenth of a core where all are wanted, all of one that is idle."""

Task = Callable[[], None]


class Reading:
    """Does jobs in threads, and gives the steps in order, each once its batch is cut.

    Each thread does what is most urgent: it cuts the next batch, once all is read for it and its
    place is free; else it plans, if no more jobs wait than were planned last; else it reads. What a
    batch holds does not depend on the number of threads.

    Args:
        plan: steps and jobs, in order; asked for the next by one thread at a time.
        read: does the reads of a job; several threads call it at once.
        cut: makes a step's batch; several threads call it at once, for different steps.
        num_threads: how many.
        num_batches: places for batches, at least 2: that of a step is free once the consumer has
            asked for the step after the one that had it before.
        start: first step.
    """

    def __init__(
        self,
        plan: Iterator[Planned],
        read: Callable[[Runs], None],
        cut: Callable[[Share], None],
        *,
        num_threads: int,
        num_batches: int,
        start: int,
    ) -> None:
        self._plan, self._read, self._cut = plan, read, cut
        self._num_batches = num_batches
        # Waking a thread that has nothing to do costs as much as its work.
        lock = threading.RLock()
        self._changed, self._arrived = threading.Condition(lock), threading.Condition(lock)
        self._jobs: deque[Job] = deque()
        self._few_jobs = 0
        self._is_planning = self._is_planned = False
        self._uncut: deque[Share] = deque()
        self._being_cut: set[int] = set()
        self._next_cut = start
        self._batches: dict[int, Share] = {}
        self._next_given = start
        self._num_threads = num_threads
        self._closed = False
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"mlsae-read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def next(self) -> Share | None:
        """The next step, once its batch is cut; None after the last.

        The batch that was given before may be cut anew from now on. What goes wrong in a thread is
        raised in place of the first step that could not be cut.
        """
        with self._changed:
            step, self._next_given = self._next_given, self._next_given + 1
            self._changed.notify_all()
            self._arrived.wait_for(lambda: step in self._batches or self._num_threads == 0)
            share = self._batches.pop(step, None)
            if share is None:
                self._next_given = step
                if self._error is not None:
                    raise self._error
            return share

    def stop(self) -> None:
        """End the threads: each does so before its next task."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        _yield_to_others()
        while (task := self._next_task()) is not None:
            try:
                task()
            except BaseException as error:
                self._fail(error)
        with self._changed:
            self._num_threads -= 1
            self._arrived.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Read no more, and raise the error once all that can still be cut is given."""
        with self._changed:
            self._error = self._error or error
            self._jobs.clear()
            self._is_planned = True
            self._changed.notify_all()

    def _next_task(self) -> Task | None:
        """Wait for something to do; None if there will be nothing."""
        with self._changed:
            while not self._closed:
                is_read = bool(self._uncut) and self._uncut[0].num_jobs == 0
                if is_read and self._uncut[0].step < self._next_given - 1 + self._num_batches:
                    return partial(self._do_cut, self._take_share())
                if not (self._is_planned or self._is_planning or len(self._jobs) > self._few_jobs):
                    self._is_planning = True
                    return self._do_plan
                all_cut_before = min(self._being_cut, default=self._next_cut)
                if self._jobs and self._jobs[0].after < all_cut_before:
                    return partial(self._do_read, self._jobs.popleft())
                if self._is_planned and not self._jobs and not is_read:
                    return None
                self._changed.wait()
            return None

    def _take_share(self) -> Share:
        share = self._uncut.popleft()
        self._being_cut.add(share.step)
        self._next_cut = share.step + 1
        return share

    def _do_cut(self, share: Share) -> None:
        try:
            self._cut(share)
        except BaseException as error:
            with self._changed:
                self._fail(error)
                self._uncut.clear()  # No step after this one will be given.
            return
        with self._changed:
            self._being_cut.remove(share.step)
            self._batches[share.step] = share
            self._changed.notify_all()
            self._arrived.notify_all()

    def _do_plan(self) -> None:
        planned = next(self._plan, None)
        with self._changed:
            self._is_planning = False
            if planned is None:
                self._is_planned = True
            elif self._error is None:
                self._few_jobs = len(planned.jobs)
                self._jobs.extend(planned.jobs)
                self._uncut.extend(planned.shares)
            self._changed.notify_all()

    def _do_read(self, job: Job) -> None:
        self._read(job.runs)
        with self._changed:
            job.share.num_jobs -= 1
            if job.share.num_jobs == 0:
                self._changed.notify_all()


def _yield_to_others() -> None:
    """Let other threads go first: a step's threads wait for the one whose core was taken."""
    if sys.platform != "linux":  # Elsewhere a priority is the whole process's.
        return
    thread = threading.get_native_id()
    if os.getpriority(os.PRIO_PROCESS, thread) < NICENESS:
        os.setpriority(os.PRIO_PROCESS, thread, NICENESS)
