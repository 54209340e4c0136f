"""Several processes on one store: division of the work, and waiting without messages.

Ranks meet in the store's directory alone, so they need no process group, and a rank that dies
holds up nobody's shards but its own.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from mlsae.base.errors import InputError
from mlsae.base.output.console import say

POLL_SECONDS = 0.25
QUIET_SECONDS = 10.0
"""Shorter waits for another rank are not worth a line."""


@dataclass(frozen=True)
class Ranks:
    """Place of this process among those that torchrun or accelerate launch started."""

    rank: int
    """0 packs the text and makes the plan."""
    world_size: int
    """Number of processes."""

    @classmethod
    def from_environment(cls, *more: str) -> "Ranks":
        """Read RANK and WORLD_SIZE as launchers set them; without them, one process.

        Args:
            more: further variables that each of several processes needs.

        Raises:
            InputError: RANK and WORLD_SIZE are no such numbers, or a variable is not set although
                there are several processes.
        """
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
            raise InputError(
                f"RANK must be 0 to WORLD_SIZE - 1, got RANK={rank} WORLD_SIZE={world_size}"
            )
        missing = [name for name in ("RANK", *more) if name not in os.environ]
        if int(world_size) > 1 and missing:
            raise InputError(
                f"WORLD_SIZE={world_size} is set, as where several processes were started, but "
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: unset "
                f"WORLD_SIZE for one process, or start several with torchrun"
            )
        return cls(int(rank), int(world_size))

    @property
    def is_first(self) -> bool:
        """True for the process that packs, plans and prints."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.is_first:
            say(line)

    def await_first(self, done: Callable[[], bool], deed: str) -> None:
        """Wait for a deed of rank 0, such as `to make the plan`; a long wait is told, once.

        Ranks of one launcher share a console, where rank 1 speaks for all.
        """
        speaks = self.rank == 1 or "LOCAL_RANK" not in os.environ
        line = (
            f"rank {self.rank} waits for rank 0 {deed}; if no other process runs this command, "
            "unset RANK and WORLD_SIZE"
        )
        wait_until(done, lambda: say(line) if speaks else None)

    def own(self, shards: list[int]) -> list[int]:
        """Shards of this process among `shards`: r, r + w, r + 2w, …"""
        return [shard for shard in shards if shard % self.world_size == self.rank]


def environment_number(name: str, default: int) -> int:
    """A number that launchers set, or the default.

    Raises:
        InputError: the variable holds something else.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name} must be a number, as launchers set it, got {text!r}: unset it")
    return int(text)


def wait_until(done: Callable[[], bool], tell: Callable[[], object] = lambda: None) -> None:
    """Poll the file system until another rank has done its part.

    Args:
        done: True once it has.
        tell: called once, if that takes more than `QUIET_SECONDS`.
    """
    began, told = time.monotonic(), False
    while not done():
        if not told and time.monotonic() - began >= QUIET_SECONDS:
            tell()
            told = True
        time.sleep(POLL_SECONDS)
