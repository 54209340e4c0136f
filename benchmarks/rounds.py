"""Contenders that are timed in turn, round after round, and what each round said."""

import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Contender:
    """Something that is timed, and what was measured.

    Rounds are those after the first, which is discarded.
    """

    name: str
    work: Callable[[], int]
    """Does a round's work; returns rows."""
    prepare: Callable[[], None] = lambda: None
    """Comes before each round, and is not timed."""
    _rows_per_second: list[float] = field(default_factory=list)
    _cpu_per_million: list[float] = field(default_factory=list)
    _system_share: list[float] = field(default_factory=list)
    _others: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """One round."""
        self.prepare()
        before, busy, start = resource.getrusage(resource.RUSAGE_SELF), busy_seconds(), clock()
        rows = self.work()
        seconds, after = clock() - start, resource.getrusage(resource.RUSAGE_SELF)
        system = after.ru_stime - before.ru_stime
        own = after.ru_utime - before.ru_utime + system
        self._rows_per_second.append(rows / seconds)
        self._cpu_per_million.append(own / rows * 1e6)
        self._system_share.append(system / own if own else 0.0)
        self._others.append(max(0.0, busy_seconds() - busy - own) / seconds)

    @property
    def speed(self) -> float:
        """Median, rows a second."""
        return statistics.median(self._rows_per_second[1:])

    def result(self) -> dict[str, Any]:
        """Medians over rounds, and quartiles of the speed."""
        low, _, high = statistics.quantiles(self._rows_per_second[1:], n=4, method="inclusive")
        return {
            "rows_per_second": round(self.speed),
            "quartiles": [round(low), round(high)],
            "cpu_seconds_per_million_rows": round(statistics.median(self._cpu_per_million[1:]), 3),
            "system_cpu_share": round(statistics.median(self._system_share[1:]), 2),
            "cores_busy_with_others": round(statistics.median(self._others[1:]), 2),
        }


def clock() -> float:
    return time.perf_counter()


def alternate(contenders: Sequence[Contender], rounds: int) -> None:
    """Measure all in turn, every second round backwards."""
    for number in range(rounds):
        for contender in contenders[:: -1 if number % 2 else 1]:
            contender.measure()


def busy_seconds() -> float:
    """CPU seconds that the whole machine has spent so far; 0 where that is not told."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = map(int, path.read_text().split()[1:10])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def anonymous_memory() -> int:
    """RssAnon + RssShmem of this process, in bytes: what files do not back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return 1024 * (int(sizes["RssAnon"]) + int(sizes["RssShmem"]))
