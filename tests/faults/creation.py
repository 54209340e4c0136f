"""A small store, killed at every step of its writing.

    python tests/faults/creation.py --variant 0 --directory /tmp/steps

For each step a child begins the store and kills itself before it; where the step is a write,
another does so after half of it. What is left, and what a power cut would have left of that in two
ways, must each read as absent or as visibly incomplete (or, at the very end, be complete and
sound), and the same producer must make the same store of it. The last line is one JSON object of
counts.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import make_store
from stepping import Line, Stepper, cut_power, read_journal

from mlsae.store import IncompleteStoreError, NotAStoreError, open_store
from mlsae.store.tools.verify import verify

VARIANTS: list[dict[str, Any]] = [
    {"layers": (0, 2)},
    {
        "layers": (1,),
        "encoding": "int8",
        "compression": "zstd",
        "d_model": 70,
        "keep_positions": 4,
    },
]
KINDS = {
    r"plan\.json": "plan",
    r"(.*/)?zarr\.json": "metadata",
    r"(tokens|documents|token_flags|row_token)/c\..*": "tokens",
    r"channel_(mean|scale)/.*": "calibration",
    r"commits/setup\.json": "setup record",
    r"(activations|block_exponents)/.*": "shard",
    r"moments/.*": "moments of a shard",
    r"commits/.*": "commit record",
    r"moments\.safetensors": "moments",
    r"README\.md": "card",
    r"complete\.json": "complete.json",
    r"provenance/.*": "provenance",
}


_PARTIAL = re.compile(rf"\.{re.escape(socket.gethostname())}-[^/]*\.partial$")


def kind_of(line: Line) -> str:
    """`fsync of plan` and the like."""
    name = _PARTIAL.sub("", line["name"])
    if line["op"] in ("mkdir", "failed") or (
        line["op"] == "fsync" and (name == "." or "." not in name)
    ):
        return f"{line['op']} of a folder"
    for pattern, kind in KINDS.items():
        if re.fullmatch(pattern, name):
            return f"{line['op']} of {kind}"
    raise ValueError(f"a step of no known kind: {line}")


def in_child(work: Callable[[], object]) -> int:
    """Do something in a process of its own; its exit status, negative for a signal.

    Nothing here may start a thread before: a fork would not take it along.
    """
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fingerprint_of(path: Path) -> str:
    """Hash of a folder's names and bytes; temporary files, which nothing reads, count by name."""
    digest = hashlib.sha256()
    for entry in sorted(path.rglob("*"), key=lambda entry: _PARTIAL.sub("", str(entry))):
        digest.update(_PARTIAL.sub(".partial", str(entry.relative_to(path))).encode() + b"\0")
        if entry.is_file() and entry.suffix != ".partial":
            digest.update(hashlib.sha256(entry.read_bytes()).digest())
    return digest.hexdigest()


def judge(path: Path, variant: dict[str, Any], store_id: str) -> None:
    """Absent, incomplete or complete and sound; then made complete, and sound."""
    try:
        assert open_store(path).store_id == store_id
        assert verify(path).problems == []
    except (IncompleteStoreError, NotAStoreError):
        pass
    make_store(path, **variant)
    assert open_store(path).store_id == store_id
    assert [str(problem) for problem in verify(path).problems] == []


def main() -> None:
    """Every step of one variant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    options = parser.parse_args()
    variant, directory = VARIANTS[options.variant], options.directory
    directory.mkdir(parents=True, exist_ok=True)
    path, journal, identity = directory / "acts", directory / "journal", directory / "store_id"

    def produce(at: int, torn: bool) -> int:
        shutil.rmtree(path, ignore_errors=True)

        def work() -> None:
            Stepper(path, journal, at, torn=torn).install()
            make_store(path, **variant)

        return in_child(work)

    def remember() -> None:
        assert verify(path).problems == []
        identity.write_text(open_store(path).store_id)

    assert produce(0, torn=False) == 0
    assert in_child(remember) == 0
    steps, store_id = read_journal(journal), identity.read_text()
    kinds, counts, seen = Counter(map(kind_of, steps)), Counter[str](), set[str]()
    for number in range(1, len(steps) + 1):
        for torn in (False, True):
            status = produce(number, torn)
            lines = read_journal(journal)
            if torn and lines[-1]["op"] != "write":
                continue
            assert status == -signal.SIGKILL, f"step {number}: {status}"
            counts["torn_writes" if torn else "kills"] += 1
            # A write that was torn was begun: what there is of it was never made durable.
            done = lines if torn else lines[:-1]
            places = {"killed": path}
            for name, keep_names in {"names lost": False, "names kept": True}.items():
                places[name] = directory / name
                shutil.rmtree(places[name], ignore_errors=True)
                if path.exists():
                    shutil.copytree(path, places[name])
                    cut_power(places[name], done, keep_names=keep_names)
                    counts["power_cuts"] += 1
            for what, place in places.items():
                # Equal files make the same store, whatever temporary ones hold.
                if (fingerprint := fingerprint_of(place)) in seen:
                    continue
                seen.add(fingerprint)
                judged = in_child(lambda place=place: judge(place, variant, store_id))  # type: ignore[misc]
                if judged != 0:
                    sys.exit(f"{what} at step {number}, torn {torn}: {steps[number - 1]}")
    print(json.dumps({"steps": len(steps), **counts, "states": len(seen), "kinds": kinds}))


if __name__ == "__main__":
    main()
