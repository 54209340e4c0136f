"""A producer that kills itself at one chosen step of its writing.

A step is a call that changes a file system below one folder: open for writing, write, fsync,
rename, link, mkdir, unlink. The calls are counted in Python; what they do, and SIGKILL, are real.

    python stepping.py --root acts --journal J --at 17 [--torn] -- harvest --model …

The journal has a line of JSON for each step, written before it. `--torn` kills after half of a
write.
"""

import _pyio
import argparse
import io
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Stepper:
    """Counts steps below `root`, writes them to `journal`, and kills the process at one of them.

    Args:
        root: folder; what happens elsewhere is no step.
        journal: file outside of it.
        at: number of the step, from 1, before which to die; 0 to live.
        torn: die after half of that step, where it is a write.
    """

    def __init__(self, root: Path, journal: Path, at: int, *, torn: bool = False) -> None:
        self._root = str(root.resolve())
        self._at, self._torn = at, torn
        self._number = 0
        self._names: dict[int, str] = {}
        self._lock = threading.RLock()
        self._write = os.write
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def install(self) -> None:
        """Replace the functions of `os`, and the `open` that paths use by one that calls them."""
        real_open, real_close = os.open, os.close
        real_rename, real_link, real_pwritev = os.rename, os.link, os.pwritev

        def stepping_open(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
            with self._lock:
                name = self._name(path)
                if name is not None and flags & (os.O_WRONLY | os.O_RDWR):
                    self._step({"op": "open", "name": name})
                number = real_open(path, flags, mode, **options)
                if name is not None:
                    self._names[number] = name
                return number

        def stepping_close(number: int) -> None:
            with self._lock:
                self._names.pop(number, None)
                real_close(number)

        def stepping_write(number: int, data: Any) -> int:
            with self._lock:
                if (name := self._names.get(number)) is not None:
                    half = bytes(data)[: len(data) // 2]
                    self._step({"op": "write", "name": name}, lambda: self._write(number, half))
                return self._write(number, data)

        def stepping_pwritev(number: int, buffers: Any, offset: int, flags: int = 0) -> int:
            with self._lock:
                if (name := self._names.get(number)) is not None:
                    data = b"".join(buffers)
                    half = data[: len(data) // 2]
                    self._step(
                        {"op": "write", "name": name},
                        lambda: real_pwritev(number, [half], offset, flags),
                    )
                return real_pwritev(number, buffers, offset, flags)

        def stepping_rename(source: Any, target: Any, **options: Any) -> None:
            with self._lock:
                if (name := self._name(source)) is not None:
                    to = self._name(target)
                    replaces = os.path.exists(target)  # noqa: PTH110
                    self._step({"op": "rename", "name": name, "to": to, "replaces": replaces})
                real_rename(source, target, **options)

        def stepping_link(source: Any, target: Any, **options: Any) -> None:
            with self._lock:
                if (name := self._name(source)) is not None:
                    self._step({"op": "link", "name": name, "to": self._name(target)})
                real_link(source, target, **options)

        os.open, os.close, os.write = stepping_open, stepping_close, stepping_write
        os.rename, os.link, os.pwritev = stepping_rename, stepping_link, stepping_pwritev
        os.fsync = self._stepping("fsync", os.fsync)
        os.mkdir = self._stepping("mkdir", os.mkdir)
        os.unlink = self._stepping("unlink", os.unlink)
        # Written in Python on top of `os`, unlike the usual one.
        io.open = _pyio.open  # type: ignore[assignment]

    def _stepping(self, op: str, real: Callable[..., None]) -> Callable[..., None]:
        def stepping(what: Any, *arguments: Any, **options: Any) -> None:
            with self._lock:
                name = self._names.get(what) if isinstance(what, int) else self._name(what)
                if name is not None:
                    self._step({"op": op, "name": name})
                try:
                    real(what, *arguments, **options)
                except OSError:
                    self._write(self._journal, b'"failed"\n')
                    raise

        return stepping

    def _name(self, path: Any) -> str | None:
        # Made absolute by hand: resolving would look at the file system.
        text = os.path.normpath(os.path.join(os.getcwd(), os.fspath(path)))  # noqa: PTH109, PTH118
        if text != self._root and not text.startswith(self._root + "/"):
            return None
        return text[len(self._root) + 1 :] or "."

    def _step(self, line: Line, half: Callable[[], object] = lambda: None) -> None:
        self._number += 1
        self._write(self._journal, json.dumps(line).encode() + b"\n")
        if self._number == self._at:
            if self._torn:
                half()
            os.kill(os.getpid(), signal.SIGKILL)


def read_journal(path: Path) -> list[Line]:
    """Read the steps, one a line; the last step of a killed process was begun and not done."""
    steps: list[Line] = []
    for line in path.read_text().splitlines():
        if line == '"failed"':  # A folder that is there already, mostly.
            steps[-1]["op"] = "failed"
        else:
            steps.append(json.loads(line))
    return steps


def cut_power(root: Path, done: list[Line], *, keep_names: bool) -> None:
    """Take from a folder what a power cut may take, besides the process.

    What was written to a file after its last fsync is lost: the file keeps half of its bytes.
    Without `keep_names` so is every name that was made after its folder's last fsync; with it names
    are kept, as file systems that order metadata before data do.

    Args:
        root: the folder.
        done: steps that were done in it, in order.
        keep_names: see above.
    """
    unsynced: set[str] = set()
    fresh: list[Line] = []
    for line in done:
        op, name = line["op"], line["name"]
        if op == "write":
            unsynced.add(name)
        elif op == "rename":
            if name in unsynced:
                unsynced.remove(name)
                unsynced.add(line["to"])
            fresh.append(line)
        elif op == "link":
            unsynced |= {line["to"]} if name in unsynced else set()
            fresh.append(line)
        elif op in ("open", "mkdir") and name != ".":
            fresh.append(line)
        elif op == "fsync":
            unsynced.discard(name)
            fresh = [one for one in fresh if str(Path(_made(one)).parent) != name]
    for line in [] if keep_names else reversed(fresh):
        made = root / _made(line)
        if line["op"] == "rename" and made.exists() and not line["replaces"]:
            made.rename(root / line["name"])
            if line["to"] in unsynced:
                unsynced.remove(line["to"])
                unsynced.add(line["name"])
        elif line["op"] in ("open", "link"):
            made.unlink(missing_ok=True)
        elif line["op"] == "mkdir":
            shutil.rmtree(made, ignore_errors=True)
    for name in unsynced:
        if (root / name).is_file():
            os.truncate(root / name, (root / name).stat().st_size // 2)


def _made(line: Line) -> str:
    name: str = line["to"] if line["op"] in ("rename", "link") else line["name"]
    return name


def main() -> None:
    """Run the command line with the steps of its store counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--at", type=int, required=True)
    parser.add_argument("--torn", action="store_true")
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    from mlsae.cli import main as command

    Stepper(options.root, options.journal, options.at, torn=options.torn).install()
    sys.argv[1:] = options.arguments
    command()


if __name__ == "__main__":
    main()
