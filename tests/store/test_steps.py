"""In what order a writer makes things durable, by the journal of its calls."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlsae.base.files import read_sealed

FAULTS = Path(__file__).parents[1] / "faults"
SCRIPT = """
import sys
from pathlib import Path
from creation import VARIANTS, make_store
from stepping import Stepper
store, journal, variant = sys.argv[1:]
Stepper(Path(store), Path(journal), 0).install()
make_store(Path(store), **VARIANTS[int(variant)])
"""


def steps_of(directory: Path, variant: int) -> list[dict[str, Any]]:
    """Each call that changed something below `directory`/acts while a store was made there."""
    subprocess.run(
        [sys.executable, "-c", SCRIPT, directory / "acts", directory / "journal", str(variant)],
        cwd=FAULTS,
        check=True,
    )
    lines = (directory / "journal").read_text().splitlines()
    return [json.loads(line) for line in lines if line != '"failed"']


def place_of(steps: list[dict[str, Any]], name: str) -> int:
    """Where an object gets its name."""
    (at,) = [i for i, step in enumerate(steps) if step.get("to") == name]
    return at


def durable_at(steps: list[dict[str, Any]], name: str) -> int:
    """From where on an object and its name are on the disk."""
    named = place_of(steps, name)
    partial = steps[named]["name"]
    assert partial.endswith(".partial")
    of_partial = [step["op"] for step in steps[:named] if step["name"] == partial]
    assert of_partial[0] == "open"
    assert of_partial[-1] == "fsync"
    # Nothing of it is written under its own name.
    assert name not in {step["name"] for step in steps if step["op"] in ("open", "write")}
    folder = str(Path(name).parent)
    return next(
        i
        for i, step in enumerate(steps)
        if i > named and (step["op"], step["name"]) == ("fsync", folder)
    )


@pytest.mark.parametrize("variant", [0, 1], ids=["float16", "int8 zstd, kept positions"])
def test_what_a_record_names_is_durable_before_the_record_is_there(tmp_path: Path, variant: int):
    """Written whole, flushed, renamed, its folder flushed; `complete.json` after all else."""
    steps = steps_of(tmp_path, variant)
    store = tmp_path / "acts"
    records = {"commits/setup.json": [], "complete.json": ["commits/setup.json", "plan.json"]}
    setup = read_sealed(store / "commits/setup.json")
    records["commits/setup.json"] = [*setup["metadata"], *setup["objects"], "plan.json"]
    commits = sorted((store / "commits").glob("[0-9]*.json"))
    assert len(commits) == 3
    for file in commits:
        moments = f"moments/{file.stem}.safetensors"
        records[f"commits/{file.name}"] = [*read_sealed(file)["objects"], moments]
        records["complete.json"].append(f"commits/{file.name}")
    records["complete.json"].append("moments.safetensors")
    for record, names in records.items():
        at = place_of(steps, record)
        for name in names:
            assert durable_at(steps, name) < at, (record, name)
    last = max(i for i, step in enumerate(steps) if "to" in step)
    assert steps[last]["to"] == "complete.json"
