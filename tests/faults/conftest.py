"""Counts of what the campaigns met and survived, and the store that nothing happened to.

Tests are no package: they load kit.py by its path, here.
"""

import json
import os
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--counts", type=Path, help="Write the campaigns' counts to this JSON file.")


class Counts:
    """What each campaign met and survived, for docs/reliability.md."""

    def __init__(self) -> None:
        self.campaigns: dict[str, Counter[str]] = {}

    def add(self, campaign: str, **numbers: int) -> None:
        """Add to a campaign's counts."""
        self.campaigns.setdefault(campaign, Counter()).update(numbers)

    def record(self) -> dict[str, Any]:
        """The counts, and how they were made."""
        from benchmarks.made import commit, machine

        return {
            "campaigns": self.campaigns,
            "command": "make reliability",
            "commit": commit(),
            "cpu_seconds": round(sum(os.times()[:4])),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "seconds": round(time.monotonic() - BEGAN),
        }


COUNTS = pytest.StashKey[Counts]()


@pytest.fixture(scope="session")
def counts(pytestconfig: pytest.Config) -> Counts:
    return pytestconfig.stash.setdefault(COUNTS, Counts())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was done, a line a campaign; and the record, if all of it was done."""
    if (found := config.stash.get(COUNTS, None)) is None:
        return
    terminalreporter.section("what was done and survived")
    for campaign, numbers in found.campaigns.items():
        told = ", ".join(f"{what.replace('_', ' ')} {n:,}" for what, n in numbers.items())
        terminalreporter.write_line(f"{campaign}: {told}")
    if (path := config.getoption("--counts", None)) is None:
        return
    if missed := [
        word
        for word in ("failed", "error", "skipped", "deselected")
        if terminalreporter.stats.get(word)
    ]:
        terminalreporter.write_line(f"{path} is left as it was: some tests {', '.join(missed)}")
        return
    path.write_text(json.dumps(found.record(), indent=2, sort_keys=True) + "\n")
    terminalreporter.write_line(f"written to {path}")


@pytest.fixture(scope="session")
def kit() -> Any:
    """tests/faults/kit.py."""
    spec = spec_from_file_location("fault_kit", Path(__file__).with_name("kit.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Its dataclasses look themselves up there.
    sys.modules["fault_kit"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def unbroken(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a harvest that nothing happened to."""
    path = tmp_path_factory.mktemp("unbroken") / "acts"
    done = kit.Harvest(path).run()
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def store_id(kit: Any, unbroken: Path) -> str:
    """Its identity."""
    found: str = kit.open_store(unbroken).store_id
    kit.assert_sound(unbroken, found)
    return found
