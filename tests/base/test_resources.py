"""Resources that the machine lacks are named before work begins."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlsae.base.resources import require_writable

SCRIPT = """
import sys
from pathlib import Path
from mlsae.base.errors import ResourceError
from mlsae.base.resources import require_writable
disk = Path(sys.argv[1])
for path in (disk, disk / "a" / "b"):
    try:
        require_writable(path, "--out")
    except ResourceError as error:
        print(error)
"""


def test_a_directory_that_can_be_written_passes(tmp_path: Path):
    require_writable(tmp_path, "--out")
    require_writable(tmp_path / "a" / "b", "--out")


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path):
    """On a real file system that is read-only, also for the superuser."""
    if shutil.which("unshare") is None:
        pytest.skip("needs the unshare command to mount a file system")
    mount = f"mount -t tmpfs -o size=64k,ro tmpfs '{tmp_path}' && exec \"$@\""
    command = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    done = subprocess.run(
        [*command, sys.executable, "-c", SCRIPT, tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    end = f"{tmp_path} is read-only here; change its permissions or give another directory"
    assert done.stdout.splitlines() == [
        f"--out {path} cannot be written: {end}" for path in (tmp_path, tmp_path / "a" / "b")
    ]
