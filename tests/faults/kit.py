"""Real processes to be harmed, and how a store must look afterwards."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mlsae.demo import model_path, text_path
from mlsae.store import StoreError, open_store
from mlsae.store.tools.verify import verify

PATIENCE_SECONDS = 240
WORKERS = min(2, os.cpu_count() or 1)
"""Campaigns run so many processes side by side."""
MLSAE = (sys.executable, "-m", "mlsae")
T = TypeVar("T")
R = TypeVar("R")
# As a user has it, whose warnings are no errors; one thread, because bits depend on it.
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Harvest:
    """`mlsae harvest` of the demo model: sixteen shards of three layers."""

    out: Path
    options: tuple[str, ...] = ()
    command: tuple[str, ...] = MLSAE
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        return [
            *self.command, "harvest", "--model", str(model_path()), "--dataset",
            str(text_path("held_out")), "--out", str(self.out), "--max-tokens", "8192",
            "--context-length", "64", "--batch-size", "4", "--shard-size", "64KiB",
            "--layers", "0-2", "--device", "cpu", *self.options,
        ]  # fmt: skip

    def start(self) -> "subprocess.Popen[str]":
        return start(self.arguments, **self.environment)

    def run(self) -> "subprocess.CompletedProcess[str]":
        return run(self.arguments, **self.environment)


def start(arguments: Sequence[object], **environment: str) -> "subprocess.Popen[str]":
    """A command that goes on by itself."""
    return subprocess.Popen(
        [str(argument) for argument in arguments],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(
    arguments: Sequence[object], *, patience: float = PATIENCE_SECONDS, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """A command to its end."""
    return subprocess.run(
        [str(argument) for argument in arguments],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=patience,
    )


def side_by_side(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` of each item, several at a time; the first error is raised."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(work, items))


def assert_refused(done: "subprocess.CompletedProcess[str]", *words: str) -> str:
    """One line for the user, exit 1, no traceback; the line."""
    lines = [line for line in done.stderr.replace("\r", "\n").split("\n") if line.strip()]
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in lines if line.startswith("Error: ")]
    assert errors == lines[-1:], done.stderr
    for word in words:
        assert word in errors[0], (word, errors[0])
    return errors[0]


def state_of(path: Path) -> str:
    """State a reader sees: absent, begun, tokens, shards or complete; anything else is an error."""
    try:
        store = open_store(path, incomplete=True)
    except StoreError as error:
        text = str(error)
        assert "does not exist" in text or "has no plan.json" in text or "is incomplete" in text
        return "begun" if "is incomplete" in text else "absent"
    if store.is_complete:
        return "complete"
    return "shards" if list((path / "commits").glob("[0-9]*.json")) else "tokens"


def assert_sound(path: Path, store_id: str) -> None:
    """Complete, with this identity, no rule broken, nothing left over."""
    assert open_store(path).store_id == store_id
    assert [str(problem) for problem in verify(path).problems] == []
    assert list(path.rglob("*.partial")) == []
