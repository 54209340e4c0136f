"""Counts of what the campaigns met and survived, and the store that nothing happened to.

Tests are no package: they load kit.py by its path, here.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--counts", type=Path, help="Put the counts of whole campaigns into this JSON file."
    )


class Counts:
    """Campaign → faults met and survived, for docs/evidence/reliability.md."""

    def __init__(self) -> None:
        self.campaigns: dict[str, Counter[str]] = {}

    def add(self, campaign: str, **numbers: int) -> None:
        """Add to a campaign's counts."""
        self.campaigns.setdefault(campaign, Counter()).update(numbers)


COUNTS = pytest.StashKey[Counts]()


@pytest.fixture(scope="session")
def counts(pytestconfig: pytest.Config) -> Counts:
    return pytestconfig.stash.setdefault(COUNTS, Counts())


@pytest.fixture(scope="module", autouse=True)
def recorded(request: pytest.FixtureRequest, counts: Counts) -> Iterator[None]:
    """A file of campaigns is put into the record when every test of it was run and has passed."""
    path = request.config.getoption("--counts", None)
    known, failed = set(counts.campaigns), request.session.testsfailed
    began, used = time.monotonic(), sum(os.times()[:4])
    yield
    is_part = request.config.getoption("keyword") or any("::" in of for of in request.config.args)
    campaigns = {name: of for name, of in counts.campaigns.items() if name not in known}
    if path is None or is_part or not campaigns or request.session.testsfailed > failed:
        return
    from benchmarks.made import commit, machine

    record = json.loads(path.read_text()) if path.exists() else {}
    record[request.path.stem] = {
        "campaigns": campaigns,
        "commit": commit(),
        "cpu_seconds": round(sum(os.times()[:4]) - used),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "seconds": round(time.monotonic() - began),
    }
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print a line for each campaign."""
    if (found := config.stash.get(COUNTS, None)) is None:
        return
    terminalreporter.section("what was done and survived")
    for campaign, numbers in found.campaigns.items():
        told = ", ".join(f"{what.replace('_', ' ')} {n:,}" for what, n in numbers.items())
        terminalreporter.write_line(f"{campaign}: {told}")


@pytest.fixture(scope="session")
def kit() -> Any:
    """tests/faults/kit.py."""
    spec = spec_from_file_location("fault_kit", Path(__file__).with_name("kit.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Dataclasses of the module look themselves up there.
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
    """Identity of the unbroken store."""
    found: str = kit.open_store(unbroken).store_id
    kit.assert_sound(unbroken, found)
    return found
