"""A few hundred stores that a hostile hand changed; `make test-faults` takes ten thousand."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "faults" / "fuzz.py"


def test_changed_stores_are_refused_or_sound(tmp_path: Path):
    """In a process of limited memory, each in limited time."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--cases", "240", "--seed", "7", "--directory", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    case = (tmp_path / "case").read_text()
    assert done.returncode == 0, f"{done.stderr[-5000:]}\nlast case: {case}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"] + found["found"] + found["sound"] >= 240
    assert min(found["refused"], found["found"], found["sound"]) > 0
