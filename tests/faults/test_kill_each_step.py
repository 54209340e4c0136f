"""Killed at every step of writing: before each call that changes the disk, inside each write."""

import itertools
import json
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

HERE = Path(__file__).parent
NUM_STEPS = 16
STEPS = {
    "open of plan",
    "write of plan",
    "fsync of plan",
    "link of plan",
    "mkdir of a folder",
    "fsync of a folder",
    *(
        f"{op} of {what}"
        for op in ("open", "write", "fsync", "rename")
        for what in (
            "metadata", "tokens", "setup record", "shard", "moments of a shard", "commit record",
            "moments", "card", "complete.json", "provenance",
        )
    ),
}  # fmt: skip


def test_at_every_step_of_making_a_small_store(kit: Any, counts: Any, tmp_path: Path) -> None:
    """Two kinds of store, in children of one process; leavings of a power cut are read too."""

    def sweep(variant: int) -> dict[str, Any]:
        script = [sys.executable, HERE / "creation.py", "--variant", variant]
        done = kit.run([*script, "--directory", tmp_path / str(variant)], patience=1000)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    found = kit.side_by_side(sweep, range(2))
    kinds = [set(of["kinds"]) for of in found]
    assert kinds[0] >= STEPS
    assert kinds[1] >= STEPS | {f"{op} of calibration" for op in ("open", "fsync", "rename")}
    totals = sum(
        (Counter({k: v for k, v in of.items() if k != "kinds"}) for of in found), Counter()
    )
    counts.add("steps", **totals)


def test_at_steps_of_a_harvest(kit: Any, counts: Any, store_id: str, tmp_path: Path) -> None:
    """Spread over all steps of the real command, which then goes on as if nothing had been."""

    def stepping(path: Path, at: int) -> Any:
        journal = tmp_path / f"journal{at}"
        script = (sys.executable, str(HERE / "stepping.py"), "--root", str(path))
        command = (*script, "--journal", str(journal), "--at", str(at), "--")
        return kit.Harvest(path, command=command), journal

    whole, journal = stepping(tmp_path / "whole", 0)
    done = whole.run()
    assert done.returncode == 0, done.stderr
    # A step that failed, such as making a folder that is there, has a second line to say so.
    num_steps = sum(line != '"failed"' for line in journal.read_text().splitlines())
    generator = random.Random(0)
    edges = [number * num_steps // NUM_STEPS for number in range(NUM_STEPS + 1)]
    chosen = [generator.randint(low + 1, high) for low, high in itertools.pairwise(edges)]
    states: Counter[str] = Counter()

    def kill(at: int) -> None:
        path = tmp_path / f"acts{at}"
        killed = stepping(path, at)[0].run()
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        states[kit.state_of(path)] += 1
        resumed = kit.Harvest(path).run()
        assert resumed.returncode == 0, resumed.stderr
        kit.assert_sound(path, store_id)
        shutil.rmtree(path)

    kit.side_by_side(kill, chosen)
    assert states.keys() >= {"begun", "shards"}, states
    counts.add("steps", harvest_steps=num_steps, harvest_kills=len(chosen))
