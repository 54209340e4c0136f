"""The broken stores of the specification, made once a session by the documented command."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def invalid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the broken stores, each of which has the SHA-256 of `cases.json`."""
    made = tmp_path_factory.mktemp("conformance") / "stores"
    command = [sys.executable, str(Path(__file__).with_name("make.py")), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made / "invalid"
