"""docs/evidence/reliability.md: made from its record, which is of whole campaigns."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


TRAINING_STATES = ("nothing", "claimed", "checkpoint", "finished")
"""States that kills of training met; the page does not tell them."""
RECORD = ROOT / "docs/evidence/reliability.json"


@pytest.fixture
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(RECORD.read_text())
    return loaded


@pytest.fixture
def page() -> Any:
    """The generator."""
    from benchmarks.reliability import reliability

    return reliability


def test_page_is_made_from_its_record(page: Any, record: dict[str, Any]):
    """`make reliability` would change nothing if it counted the same."""
    assert page(record) == (ROOT / "docs/evidence/reliability.md").read_text()


def test_every_count_is_shown(page: Any, record: dict[str, Any]):
    """Another number in the record, whichever, is another page."""
    shown = page(record)
    for file, run in record.items():
        for counts in [*run["campaigns"].values(), run]:
            for what in [what for what, value in counts.items() if type(value) is int]:
                if file == "test_train_kills" and what in TRAINING_STATES:
                    continue
                counts[what] += 1_234_567
                assert page(record) != shown, what
                counts[what] -= 1_234_567


def test_a_file_that_is_missing_is_named(page: Any, record: dict[str, Any]):
    """Whatever the record has nothing of the page says it has not."""
    for file in record:
        shown = page({name: run for name, run in record.items() if name != file})
        absent = shown.partition("Not in this record: ")[2].partition("\n\n")[0]
        assert f"`{file}.py`" in absent


def test_the_campaigns_are_as_large_as_they_are_said_to_be(record: dict[str, Any]):
    """Those that are in the record; each file of them is one of tests/faults, at a commit."""
    assert record.keys() <= {path.stem for path in (ROOT / "tests/faults").glob("test_*.py")}
    least = {
        "kills": ("kills", 50),
        "flips": ("flips", 200),
        "steps": ("power_cuts", 500),
        "fuzz": ("refused", 1_000),
        "remote": ("unavailable", 20),
    }
    for run in record.values():
        assert re.fullmatch(r"[0-9a-f]{40}", run["commit"])
        for name, counts in run["campaigns"].items():
            what, number = least.get(name, (min(counts), 1))
            assert counts[what] >= number, name
            if name == "steps":
                assert counts["kills"] == counts["steps"]


def test_all_of_it_takes_two_idle_cores_twenty_minutes_at_most(record: dict[str, Any]):
    """By processor time; how long it took beside other programs says nothing."""
    assert sum(run["cpu_seconds"] for run in record.values()) <= 2 * 20 * 60
