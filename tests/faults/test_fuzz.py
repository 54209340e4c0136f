"""Stores from strangers, by the ten thousand: a named error or a sound store, and nothing else."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

NUM_CASES = 10_000


def test_changed_stores(kit: Any, counts: Any, tmp_path: Path) -> None:
    """Each half in a process with a limit of memory, each case with a limit of time."""

    def half(number: int) -> dict[str, float]:
        directory = tmp_path / str(number)
        script = [sys.executable, Path(__file__).with_name("fuzz.py"), "--directory", directory]
        options = ["--cases", NUM_CASES // 2, "--seed", number]
        done = kit.run([*script, *options], patience=1400)
        case = (directory / "case").read_text()
        assert done.returncode == 0, f"{done.stderr[-5000:]}\nlast case: {case}"
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    found = kit.side_by_side(half, range(2))
    totals = sum(
        (Counter({k: v for k, v in of.items() if type(v) is int}) for of in found), Counter()
    )
    most_memory = max(of["most_memory_mib"] for of in found)
    del totals["most_memory_mib"]
    assert sum(totals.values()) >= NUM_CASES
    # Many get past the first record, and some changes are none.
    assert min(totals[outcome] for outcome in ("refused", "found", "sound")) > NUM_CASES // 50
    counts.add("fuzz", **totals, most_memory_mib=most_memory)
