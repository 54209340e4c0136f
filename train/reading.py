"""Threads that fill batches ahead of the one that takes them."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator

from mlsae.train.jobs import Job, Share

NICENESS = 10
"""Of the threads that read: a tenth of a core where all are wanted, all of one that is idle."""


class Reading:
    """Does jobs in threads, and gives the steps in order, each once its batch is complete.

    What a batch holds does not depend on the number of threads.

    Args:
        jobs: taken in order, by one thread at a time.
        do: does the reads of a job; several threads call it at once.
        num_threads: how many.
        start: first step.
    """

    def __init__(
        self, jobs: Iterator[Job], do: Callable[[Job], None], num_threads: int, start: int
    ) -> None:
        self._jobs, self._do = jobs, do
        self._taking = threading.Lock()
        self._changed = threading.Condition()
        self._shares: deque[Share] = deque()
        self._newest: Share | None = None
        self._released = start - 1
        self._num_busy = num_threads
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

        The batch that was given before may be filled anew from now on. What goes wrong in a thread
        is raised in place of the first step that is not complete.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_ready() or self._has_ended())
            if not self._is_ready() or self._closed:
                if self._error is not None:
                    raise self._error
                return None
            share = self._shares.popleft()
            self._released = share.step - 1
            self._changed.notify_all()
            return share

    def stop(self) -> None:
        """End the threads: each does so before its next job."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _is_ready(self) -> bool:
        return bool(self._shares) and self._shares[0].num_jobs == 0

    def _has_ended(self) -> bool:
        return self._closed or self._error is not None or self._num_busy == 0

    def _run(self) -> None:
        _yield_to_others()
        try:
            while (job := self._take()) is not None and self._may_do(job):
                self._do(job)
                with self._changed:
                    job.share.num_jobs -= 1
                    if job.share.num_jobs == 0:
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._num_busy -= 1
                self._changed.notify_all()

    def _take(self) -> Job | None:
        with self._taking:
            job = next(self._jobs, None)
            if job is not None and job.share is not self._newest:
                self._newest = job.share
                with self._changed:
                    self._shares.append(job.share)
            return job

    def _may_do(self, job: Job) -> bool:
        """Wait until the batches that it fills are free; False if that is moot."""
        with self._changed:
            self._changed.wait_for(lambda: self._released >= job.after or self._closed)
            return not self._closed


def _yield_to_others() -> None:
    """Let other threads go first: a step's threads wait for the one whose core was taken."""
    if sys.platform != "linux":  # Elsewhere a priority is the whole process's.
        return
    thread = threading.get_native_id()
    if os.getpriority(os.PRIO_PROCESS, thread) < NICENESS:
        os.setpriority(os.PRIO_PROCESS, thread, NICENESS)
