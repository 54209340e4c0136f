"""Several processes on one store: who does what, and how they wait without talking.

Ranks meet in the store's directory alone, so they need no process group, and a rank that dies
holds up nobody's shards but its own.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import click

from mlsae.base.errors import InputError

POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun or accelerate launch started."""

    rank: int
    """0 packs the text and makes the plan."""
    world_size: int
    """Number of processes."""

    @classmethod
    def from_environment(cls) -> "Ranks":
        """RANK and WORLD_SIZE as launchers set them; one process where they do not.

        Raises:
            InputError: they are no such numbers.
        """
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
            raise InputError(
                f"RANK must be 0 to WORLD_SIZE - 1, got RANK={rank} WORLD_SIZE={world_size}"
            )
        return cls(int(rank), int(world_size))

    @property
    def is_first(self) -> bool:
        """Whether this process packs, plans and prints."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.is_first:
            click.echo(line)

    def own(self, shards: list[int]) -> list[int]:
        """Those of `shards` that are this process's: r, r + w, r + 2w, …"""
        return [shard for shard in shards if shard % self.world_size == self.rank]


def wait_until(done: Callable[[], bool]) -> None:
    """Look at the file system until another rank has done its part."""
    while not done():
        time.sleep(POLL_SECONDS)
