"""Resources that the machine lacks are named before work begins."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlsae.base.machine.resources import left_in_control_groups, require_writable

SCRIPT = """
import sys
from pathlib import Path
from mlsae.base.errors import ResourceError
from mlsae.base.machine.resources import left_in_control_groups, require_writable
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


def test_memory_left_is_that_of_the_tightest_control_group(tmp_path: Path):
    """A group's own limit or that of one it is in; pages of files that are not in use are free."""
    root, own = tmp_path / "groups", tmp_path / "own"
    for folder, names, numbers in (
        ("job", ("memory.max", "memory.current"), ("1000", "700")),
        ("job/step", ("memory.max", "memory.current"), ("max", "500")),
        ("memory/a", ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("2000", "1900")),
    ):
        (root / folder).mkdir(parents=True)
        for name, number in zip(names, numbers, strict=True):
            (root / folder / name).write_text(f"{number}\n")
    (root / "job" / "memory.stat").write_text("anon 100\ninactive_file 600\nactive_file 0\n")
    (root / "memory/a/memory.stat").write_text("inactive_file 1\ntotal_inactive_file 1500\n")
    for groups, left in (
        ("0::/job/step\n", 1000 - 700 + 600),
        ("9:cpu,cpuacct:/\n4:memory:/a/b\n0::/\n", 2000 - 1900 + 1500),
        ("4:memory:/a\n0::/job\n", 900),
        ("0::/\n", sys.maxsize),
    ):
        own.write_text(groups)
        assert left_in_control_groups(str(own), str(root)) == left
    assert left_in_control_groups(str(tmp_path / "absent"), str(root)) == sys.maxsize
