"""Threads that take several SAEs' steps side by side, each SAE in one of them at a time.

A step of a small SAE keeps few cores busy: much of it is work in one thread. So where a machine has
more cores, SAEs that share no rank with another process take their steps at the same time, and each
has its share of the threads. Bits depend on the number of threads that a step has: it follows from
the number of SAEs of the run, and training.json has it.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class TeamShape(NamedTuple):
    """A team's shape."""

    num_workers: int
    """SAEs that take a step at the same time."""
    num_threads: int
    """Threads in each step."""


def team_shape(num_saes: int, device: torch.device, num_ranks: int) -> TeamShape:
    """Share a process's threads among its SAEs.

    Args:
        num_saes: SAEs in the process.
        device: the SAEs' device; any but a CPU takes steps one after another.
        num_ranks: processes that share each batch: their sums come in one order.
    """
    threads = torch.get_num_threads()
    workers = min(num_saes, threads) if device.type == "cpu" and num_ranks == 1 else 1
    return TeamShape(workers, threads // workers)


class Team:
    """Threads that work for several SAEs. A context manager: leaving it ends the threads.

    Args:
        shape: the team's shape; with one worker there are no threads but the caller's.
    """

    def __init__(self, shape: TeamShape) -> None:
        self.shape = shape
        self._pool: ThreadPoolExecutor | None = None
        self._is_first = True

    def __enter__(self) -> "Team":
        if self.shape.num_workers > 1:
            # torch's number of threads belongs to the calling thread.
            self._pool = ThreadPoolExecutor(
                self.shape.num_workers,
                "mlsae-sae",
                initializer=torch.set_num_threads,
                initargs=(self.shape.num_threads,),
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`work` on each item, in their order."""
        if self._pool is None:
            return [work(item) for item in items]
        if self._is_first:
            # Things set up once a process, such as torch's warnings, are set up without a race.
            self._is_first = False
            return [self._pool.submit(work, item).result() for item in items]
        return list(self._pool.map(work, items))
