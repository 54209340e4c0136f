"""Threads that read batches ahead of the one that takes them."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from mlsae.base.machine.priority import yield_to_others
from mlsae.store.read.scatter import Runs
from mlsae.train.data.jobs import Job, Planned, Share

Task = Callable[[], None]


class Reading:
    """Jobs done in threads, and steps given in order, each once its batch is complete.

    Each thread does the most urgent task: it plans, if no more jobs wait than were planned last;
    else it reads, once the batches that the next job goes to are free. The rows of a
    batch do not depend on the number of threads.

    Args:
        plan: steps and jobs, in order; asked for the next by one thread at a time.
        read: does the reads of a job; several threads call it at once.
        num_threads: number of threads.
        num_batches: batches in memory, as many as a job is spread over or more: that of a step is
            free once the consumer has asked for a step after the one that had it before.
        start: first step.
    """

    def __init__(
        self,
        plan: Iterator[Planned],
        read: Callable[[Runs], None],
        *,
        num_threads: int,
        num_batches: int,
        start: int,
    ) -> None:
        self._plan, self._read = plan, read
        self._num_batches = num_batches
        # Waking a thread that has nothing to do costs as much as its work.
        lock = threading.RLock()
        self._changed, self._arrived = threading.Condition(lock), threading.Condition(lock)
        self._jobs: deque[Job] = deque()
        self._few_jobs = 0
        self._is_planning = self._is_planned = False
        self._shares: deque[Share] = deque()
        self._asked = start - 1
        """Step that the consumer asked for last."""
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
        """The next step, once its batch is complete; None after the last.

        The batch that was given before may be read over from now on. An error in a thread is
        raised in place of the first step that lacks something.
        """
        with self._changed:
            self._asked += 1
            self._changed.notify_all()
            self._arrived.wait_for(lambda: self._is_complete() or self._num_threads == 0)
            if self._is_complete():
                return self._shares.popleft()
            self._asked -= 1
            if self._error is not None:
                raise self._error
            return None

    def stop(self) -> None:
        """End the threads: each does so before its next task."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _is_complete(self) -> bool:
        return bool(self._shares) and self._shares[0].num_jobs == 0

    def _run(self) -> None:
        yield_to_others()
        while (task := self._next_task()) is not None:
            try:
                task()
            except BaseException as error:
                self._fail(error)
        with self._changed:
            self._num_threads -= 1
            self._arrived.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Read no more, and raise the error once all that is complete is given."""
        with self._changed:
            self._error = self._error or error
            self._jobs.clear()
            self._is_planned = True
            self._changed.notify_all()

    def _next_task(self) -> Task | None:
        """Wait for something to do; None if there will be nothing."""
        with self._changed:
            while not self._closed:
                if not (self._is_planned or self._is_planning or len(self._jobs) > self._few_jobs):
                    self._is_planning = True
                    return self._do_plan
                if self._jobs and self._jobs[0].until < self._asked + self._num_batches:
                    return partial(self._do_read, self._jobs.popleft())
                if self._is_planned and not self._jobs:
                    return None
                self._changed.wait()
            return None

    def _do_plan(self) -> None:
        planned = next(self._plan, None)
        with self._changed:
            self._is_planning = False
            if planned is None:
                self._is_planned = True
            elif self._error is None:
                self._few_jobs = len(planned.jobs)
                self._jobs.extend(planned.jobs)
                self._shares.extend(planned.shares)
            self._changed.notify_all()
            self._arrived.notify_all()

    def _do_read(self, job: Job) -> None:
        self._read(job.runs)
        with self._changed:
            job.share.num_jobs -= 1
            if job.share.num_jobs == 0:
                self._arrived.notify_all()
