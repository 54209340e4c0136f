"""Disks that are full or cannot be written, in mount namespaces of their own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
TRAIN = ("-R", "4", "-k", "8", "--batch-size", "1024", "--device", "cpu")


@pytest.fixture(scope="module")
def sae(kit: Any, unbroken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the store that nothing happened to."""
    out: Path = tmp_path_factory.mktemp("sae") / "sae"
    done = kit.run([*kit.MLSAE, "train", "--cache", unbroken, "--out", out, *TRAIN])
    assert done.returncode == 0, done.stderr
    return out


def on_small_disk(kit: Any, disk: Path, size: str, script: str, *arguments: Path) -> dict[str, int]:
    """Run a script of this folder with a small file system at `disk`; its counts."""
    disk.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("needs the unshare command to mount a small file system")
    mount = f"mount -t tmpfs -o size={size} tmpfs '{disk}' && exec \"$@\""
    command = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    done = kit.run([*command, sys.executable, HERE / script, disk, *arguments], patience=800)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def test_a_disk_that_fills(
    kit: Any, counts: Any, unbroken: Path, sae: Path, store_id: str, tmp_path: Path
) -> None:
    assert store_id
    found = on_small_disk(kit, tmp_path / "disk", "24m", "full_disk.py", unbroken, sae)
    assert found == {"harvest": 5, "train": 3, "analyze": 2}
    counts.add("full disk", **found)


def test_a_disk_that_cannot_be_written(
    kit: Any, counts: Any, unbroken: Path, sae: Path, tmp_path: Path
) -> None:
    found = on_small_disk(
        kit, tmp_path / "disk", "64m", "read_only.py", unbroken, sae, tmp_path / "out"
    )
    assert found == {"refused": 6, "worked": 4}
    counts.add("read-only disk", **found)
