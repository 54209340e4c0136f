"""A disk that cannot be written: reading works as ever, and writing is refused before any work.

    unshare --mount sh -c 'mount -t tmpfs -o size=64m tmpfs DISK && exec "$@"' sh \\
        python tests/faults/read_only.py DISK STORE SAE OUT

DISK is a file system of its own; STORE and SAE are copied to it before it is made read-only; OUT
can be written. The last line is one JSON object of counts.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from kit import MLSAE, Harvest, assert_refused, run

TRAIN = ("-R", "4", "-k", "8", "--batch-size", "1024", "--device", "cpu")


def main() -> None:
    """Refusals, then everything that reads."""
    disk, store, sae, out = (Path(argument) for argument in sys.argv[1:])
    counts: Counter[str] = Counter()
    (disk / "empty").mkdir()
    shutil.copytree(store, disk / "acts")
    shutil.copytree(sae, disk / "sae")
    shutil.copytree(store, disk / "unfinished")
    for name in ("complete.json", "commits/00007.json"):
        (disk / "unfinished" / name).unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for name in ("absent", "empty", "unfinished", "acts"):
        done = Harvest(disk / name).run()
        assert_refused(done, f"--out {disk / name} cannot be written: {disk}", "is read-only here")
        # Nothing was packed, and no model was run.
        assert done.stdout == ""
        counts["refused"] += 1
    for arguments in (
        ["train", "--cache", disk / "acts", "--out", disk / "absent", *TRAIN],
        ["analyze", "--cache", disk / "acts", "--sae", disk / "sae", "--out", disk / "absent"],
    ):
        line = assert_refused(run([*MLSAE, *arguments]), str(disk))
        assert "ead-only" in line, line
        counts["refused"] += 1
    for arguments in (
        ["store", "info", disk / "acts"],
        ["store", "verify", disk / "acts"],
        ["train", "--cache", disk / "acts", "--out", out / "sae", *TRAIN],
        ["analyze", "--cache", disk / "acts", "--sae", disk / "sae", "--out", out / "analysis"],
    ):
        done = run([*MLSAE, *arguments])
        assert done.returncode == 0, (arguments, done.stderr)
        counts["worked"] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
