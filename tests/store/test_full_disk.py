"""A disk that fills in the middle of a shard: one line, nothing lost, and the rerun finishes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import shutil, sys
from pathlib import Path
import numpy as np
from mlsae.base.errors import ResourceError
from mlsae.store import create, open_store
from mlsae.store.tools.verify import verify

disk = Path(sys.argv[1])
ballast = disk / "ballast"
shape = dict(tokens=np.arange(4096) % 50, context_length=64, layers=(0, 1), d_model=64)

def produce(room):
    # Fill the disk but for `room` bytes after three shards.
    with create(disk / "acts", **shape, batch_sequences=1, shard_bytes=2**16) as writer:
        while writer.pending():  # Waits until what was appended is durable.
            if room and writer.position == 3 * writer.shard_rows:
                ballast.write_bytes(bytes(shutil.disk_usage(disk).free - room))
            rows = np.random.default_rng(writer.position).normal(size=(2, 64, 64))
            writer.append({("resid_post", 0): rows[0], ("resid_post", 1): rows[1]})

for room in (40_000, 150_000):
    try:
        produce(room)
    except ResourceError as error:
        print(error)
    print("partial files:", len(list((disk / "acts").rglob("*.partial"))))
    ballast.unlink()
produce(0)
print("problems:", verify(disk / "acts").problems, open_store(disk / "acts").num_rows)
"""


def test_a_full_disk_stops_the_writer_and_the_rerun_finishes(tmp_path: Path):
    """A real file system of four megabytes fills while a shard, then its moments are written."""
    if shutil.which("unshare") is None:
        pytest.skip("needs the unshare command to mount a small file system")
    mount = f"mount -t tmpfs -o size=4m tmpfs '{tmp_path}' && exec \"$@\""
    command = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    done = subprocess.run(
        [*command, sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *stops, finished = done.stdout.splitlines()
    assert re.fullmatch(r"the disk is full: .*/c\.3\.0 could not be written; what was .*", stops[0])
    assert re.fullmatch(
        r"the disk is full: .*/00003\.safetensors could not be written; .*", stops[2]
    )
    assert stops[1] == stops[3] == "partial files: 0"
    assert stops[2].endswith("is safe, free some space and run the same command again")
    assert finished == "problems: [] 4096"
