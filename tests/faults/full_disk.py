"""Commands whose disk fills while they write: one line, nothing lost, and they can go on.

    unshare --mount sh -c 'mount -t tmpfs -o size=24m tmpfs DISK && exec "$@"' sh \\
        python tests/faults/full_disk.py DISK STORE SAE

DISK is a small file system of its own, STORE a harvest that nothing happened to, SAE trained on
it. A command is stopped at a moment, the disk filled but for a few bytes, and the command let go
on. The last line is one JSON object of counts.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from kit import ENVIRONMENT, MLSAE, Harvest, assert_refused, assert_sound, run, state_of

from mlsae.base.units import portion
from mlsae.store import open_store

# A checkpoint at every line of the log.
TRAIN = (
    "-R", "4", "-k", "8", "--batch-size", "256", "--device", "cpu", "--checkpoint-seconds", "0",
)  # fmt: skip
Reached = Callable[[], bool]


class Disk:
    """A small disk, and what fills it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, room: int) -> None:
        """But for so many bytes."""
        free = shutil.disk_usage(self.path).free
        with self._ballast.open("wb") as file:
            file.write(bytes(max(0, free - room)))

    def free(self) -> None:
        """Give the room back."""
        self._ballast.unlink()


def run_until_full(
    arguments: list[str], reached: Reached, disk: Disk, room: int
) -> "subprocess.CompletedProcess[str]":
    """A command whose disk is full from the moment on that something is there."""
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not reached() and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGSTOP)
    disk.fill(room)
    process.send_signal(signal.SIGCONT)
    out, errors = process.communicate(timeout=240)
    return subprocess.CompletedProcess(arguments, process.returncode, out, errors)


def harvests(disk: Disk, store_id: str, counts: Counter[str]) -> None:
    """Full before the start, and at moments of the run."""
    acts = disk.path / "acts"

    def commits() -> int:
        return len(list((acts / "commits").glob("[0-9]*.json")))

    disk.fill(4096)
    assert_refused(Harvest(acts).run(), "disk")
    disk.free()
    counts["harvest"] += 1
    moments: dict[str, tuple[Reached, int]] = {
        "tokens": ((acts / "plan.json").exists, 0),
        "first shard": ((acts / "commits/setup.json").exists, 9_000),
        "some shard": (lambda: commits() >= 4, 70_000),
        "its moments": (lambda: commits() >= 9, 210_000),
    }
    for moment, (reached, room) in moments.items():
        done = run_until_full(Harvest(acts).arguments, reached, disk, room)
        line = assert_refused(done, "the disk is full: ")
        assert line.endswith(
            "could not be written; what was finished before is safe, free some space and run the "
            "same command again"
        ), line
        assert not list(acts.rglob("*.partial")), moment
        before = commits()
        assert state_of(acts) in ("begun", "tokens", "shards"), moment
        disk.free()
        again = Harvest(acts).run()
        assert again.returncode == 0, again.stderr
        if before:
            assert f"going on: {portion(before, 16, 'shard')} there" in again.stdout
        assert_sound(acts, store_id)
        shutil.rmtree(acts)
        counts["harvest"] += 1


def trainings(disk: Disk, store: Path, counts: Counter[str]) -> None:
    """Full while checkpoints are written, and before the SAE is."""
    whole, out = disk.path / "whole", disk.path / "sae"

    def command(where: Path, *more: str) -> list[str]:
        arguments = ["train", "--cache", str(store), "--out", str(where), *TRAIN, *more]
        return [*MLSAE, *arguments]

    done = run(command(whole))
    assert done.returncode == 0, done.stderr
    expected = (whole / "sae.safetensors").read_bytes()
    shutil.rmtree(whole)

    def checkpoints() -> int:
        return len(list((out / "checkpoints").glob("step-*.json")))

    def steps() -> int:
        names = [path.stem for path in (out / "checkpoints").glob("step-*.json")]
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    moments: dict[str, tuple[Reached, int]] = {
        "first checkpoint": ((out / "run.json").exists, 30_000),
        "a later checkpoint": (lambda: checkpoints() == 2, 100_000),
        "late": (lambda: steps() >= 60, 0),
    }
    for moment, (reached, room) in moments.items():
        done = run_until_full(command(out), reached, disk, room)
        assert_refused(done)
        assert "full" in done.stderr or "No space left" in done.stderr, (moment, done.stderr)
        assert not (out / "sae.safetensors").exists(), moment
        disk.free()
        again = run(command(out, "--resume"))
        assert again.returncode == 0, (moment, again.stderr)
        assert (out / "sae.safetensors").read_bytes() == expected, moment
        shutil.rmtree(out)
        counts["train"] += 1


def analyses(disk: Disk, store: Path, sae: Path, counts: Counter[str]) -> None:
    """Full while tables are written."""
    out = disk.path / "analysis"
    arguments = ["analyze", "--cache", str(store), "--sae", str(sae), "--rows", "all"]
    command = [*MLSAE, *arguments, "--out", str(out)]

    def partial() -> Path | None:
        return next(out.glob("new-*.partial"), None)

    moments: dict[str, tuple[Reached, int, str]] = {
        # Room for the largest table is estimated before it is begun.
        "events": (lambda: partial() is not None, 0, "not enough disk"),
        "tables": (lambda: any(out.glob("new-*.partial/events/*")), 8_000, "disk is full"),
    }
    for moment, (reached, room, expected) in moments.items():
        done = run_until_full(command, reached, disk, room)
        assert_refused(done)
        assert expected in done.stderr, (moment, done.stderr)
        assert not out.exists(), moment
        assert partial() is None, moment
        disk.free()
        again = run(command)
        assert again.returncode == 0, (moment, again.stderr)
        assert (out / "summary.json").exists()
        shutil.rmtree(out)
        counts["analyze"] += 1


def main() -> None:
    """Each command in turn."""
    disk, store, sae = Disk(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    counts: Counter[str] = Counter()
    harvests(disk, open_store(store).store_id, counts)
    trainings(disk, store, counts)
    analyses(disk, store, sae, counts)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
