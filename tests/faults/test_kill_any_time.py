"""kill -9 at random instants of a real harvest, again and again, until it is done."""

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

NUM_KILLS = 50
CHAIN = ("start", "packing", "start", "setup", "shards", "shards", "shards", "completion")
"""Kills of one store, in order, before it may finish."""


@dataclass(frozen=True)
class Phases:
    """Seconds from a harvest's start to what can be seen in its directory, measured."""

    plan: float
    setup: float
    last_commit: float
    end: float


def commits(path: Path) -> int:
    """Shards that are committed."""
    return len(list((path / "commits").glob("[0-9]*.json")))


def await_state(process: Any, reached: Callable[[], bool]) -> float:
    """Look until something is there, or the process has ended; when that was."""
    while not reached() and process.poll() is None:
        time.sleep(0.0005)
    return time.monotonic()


def measure(kit: Any, path: Path, num_shards: int) -> Phases:
    """One harvest, watched."""
    process = kit.Harvest(path).start()
    began = time.monotonic()
    plan = await_state(process, (path / "plan.json").exists)
    setup = await_state(process, (path / "commits/setup.json").exists)
    last = await_state(process, lambda: commits(path) == num_shards)
    process.communicate()
    assert process.returncode == 0
    return Phases(plan - began, setup - began, last - began, time.monotonic() - began)


def kill(kit: Any, path: Path, phase: str, share: float, phases: Phases, num_shards: int) -> bool:
    """Begin or continue a harvest and kill it in a phase; whether it was killed before its end."""
    there = commits(path)
    process = kit.Harvest(path).start()
    if phase == "start":
        seconds = share * phases.plan
    elif phase == "packing":
        # The text is packed and a batch tried just before the plan is written.
        seconds = (0.6 + 0.4 * share) * phases.plan
    elif phase == "setup":
        await_state(process, (path / "plan.json").exists)
        seconds = share * (phases.setup - phases.plan)
    elif phase == "shards":
        await_state(process, lambda: commits(path) > there)
        left = (num_shards - there) / num_shards
        seconds = share * left * (phases.last_commit - phases.setup)
    else:
        await_state(process, lambda: commits(path) == num_shards)
        seconds = share * (phases.end - phases.last_commit)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return bool(process.returncode == -signal.SIGKILL)


def test_killed_at_random_instants_it_ends_as_the_same_store(
    kit: Any, counts: Any, store_id: str, unbroken: Path, tmp_path: Path
) -> None:
    num_shards = commits(unbroken)
    phases = measure(kit, tmp_path / "measured", num_shards)
    assert phases.plan < phases.setup < phases.last_commit < phases.end
    found: Counter[str] = Counter()

    def chain(number: int) -> int:
        generator, kills = random.Random(number), 0
        path = tmp_path / f"acts{number}"
        for phase in CHAIN:
            if kill(kit, path, phase, generator.random(), phases, num_shards):
                kills += 1
                found[kit.state_of(path)] += 1
        done = kit.Harvest(path).run()
        assert done.returncode == 0, done.stderr
        kit.assert_sound(path, store_id)
        shutil.rmtree(path)
        return kills

    kills, number = 0, 0
    while kills < NUM_KILLS:
        kills += sum(kit.side_by_side(chain, range(number, number + kit.WORKERS)))
        number += kit.WORKERS
    assert found.keys() >= {"absent", "begun", "shards"}, found
    counts.add("kills", kills=kills, stores=number, **found)
