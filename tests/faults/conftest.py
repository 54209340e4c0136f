"""Counts of what the campaigns met and survived, and the store that nothing happened to.

Tests are no package: they load kit.py by its path, here.
"""

import json
import os
import subprocess
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
    parser.addoption("--counts", type=Path, help="Write the campaigns' counts to this JSON file.")


class Counts:
    """What each campaign met and survived, for docs/reliability.md."""

    def __init__(self) -> None:
        self.campaigns: dict[str, Counter[str]] = {}

    def add(self, campaign: str, **numbers: int) -> None:
        """Add to a campaign's counts, and show them."""
        self.campaigns.setdefault(campaign, Counter()).update(numbers)
        print(f"{campaign}: {json.dumps(numbers)}")


@pytest.fixture(scope="session")
def counts(request: pytest.FixtureRequest) -> Iterator[Counts]:
    found, began = Counts(), time.monotonic()
    yield found
    path = request.config.getoption("--counts", None)
    if path is not None and not request.session.testsfailed:
        content = {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": _commit(),
            "seconds": round(time.monotonic() - began),
            "cores": os.cpu_count(),
            "campaigns": found.campaigns,
        }
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


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
