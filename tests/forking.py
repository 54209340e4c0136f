"""Processes forked from one that has imported already: an import takes longer than most tests.

    with importing("mlsae.harvest.pipeline") as forking:
        process = forking.start("import sys; print(sys.argv[1:])", "one", "two")
        assert process.wait() == 0, process.errors
        process.output

Each has arguments, environment and output of its own, takes signals, and ends as an interpreter
ends. Tests are no package: they load this file by its path.
"""

import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PATIENCE_SECONDS = 120
_DESCRIPTOR = "FORKING_DESCRIPTOR"
_CLIENT = f"""\
import json, os, sys, tempfile, time

name, *words = sys.argv[1:]
if name == "python" and words != ["-"]:
    os.execv(sys.executable, [sys.executable, *words])
run = sys.stdin.read() if name == "python" else (
    "import runpy; runpy.run_module('mlsae', run_name='__main__', alter_sys=True)"
)
directory = tempfile.mkdtemp(dir=os.path.dirname(sys.argv[0]))
for stream in ("output", "errors"):
    open(os.path.join(directory, stream), "w").close()
asked = {{
    "code": f"import os; os.chdir({{os.getcwd()!r}})\\n{{run}}",
    "words": [name, *words],
    "environment": dict(os.environ),
    "directory": directory,
}}
os.write(int(os.environ["{_DESCRIPTOR}"]), (json.dumps(asked) + "\\n").encode())
while not os.path.exists(status := os.path.join(directory, "status")):
    time.sleep(0.005)
for stream, to in (("output", sys.stdout), ("errors", sys.stderr)):
    to.buffer.write(open(os.path.join(directory, stream), "rb").read())
    to.flush()
sys.exit(int(open(status).read()) % 256)
"""
"""A command that asks for a forked process, waits for it and repeats what it printed."""


class Process:
    """A forked process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.pid = int(self._await("pid"))

    def _await(self, name: str) -> str:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (self._directory / name).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {name} after {PATIENCE_SECONDS} seconds: {self.errors}")
            time.sleep(0.001)
        return (self._directory / name).read_text()

    def poll(self) -> int | None:
        """Exit status, the negative number of the signal that ended it, or None: it runs."""
        status = self._directory / "status"
        return int(status.read_text()) if status.exists() else None

    def wait(self) -> int:
        """Exit status, once it has ended."""
        return int(self._await("status"))

    def send_signal(self, number: int) -> None:
        """A signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """Text that it has printed until now."""
        return (self._directory / "output").read_text()

    @property
    def errors(self) -> str:
        """Text that it has written to standard error until now."""
        return (self._directory / "errors").read_text()


class Forking:
    """The process that has imported, and those that were forked from it."""

    def __init__(self, server: "subprocess.Popen[str]", directory: Path) -> None:
        self._server = server
        self._directory = directory
        self._processes: list[Process] = []

    def start(
        self, code: str, *words: object, environment: Mapping[str, str] | None = None
    ) -> Process:
        """Run `code` with `words` as its arguments, in this process's environment and more."""
        directory = self._directory / str(len(self._processes))
        directory.mkdir()
        for name in ("output", "errors"):
            (directory / name).touch()
        asked = {
            "code": code,
            "words": ["-c", *map(str, words)],
            "environment": {**os.environ, **(environment or {})},
            "directory": str(directory),
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        self._processes.append(Process(directory))
        return self._processes[-1]

    def shell(self, directory: Path) -> dict[str, Any]:
        """Options of `subprocess.run` for a shell whose `mlsae` and `python -` are forked.

        Args:
            directory: an empty directory for the two commands and their output.
        """
        assert self._server.stdin is not None
        descriptor = self._server.stdin.fileno()
        client = directory / "client.py"
        client.write_text(_CLIENT)
        for name in ("mlsae", "python"):
            # The line that names an interpreter ends at a space, which paths may have.
            words = shlex.join([sys.executable, "-IS", str(client), name])
            (directory / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            (directory / name).chmod(0o755)
        path = f"{directory}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, _DESCRIPTOR: str(descriptor)}
        return {"env": environment, "pass_fds": (descriptor,)}

    def end(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            process.send_signal(signal.SIGKILL)


@contextmanager
def importing(*modules: str, environment: Mapping[str, str] | None = None) -> Iterator[Forking]:
    """Fork processes that have imported some modules, in an environment that these may read."""
    with (
        TemporaryDirectory() as directory,
        subprocess.Popen(
            [sys.executable, "-P", __file__, *modules],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        forking = Forking(server, Path(directory))
        try:
            yield forking
        finally:
            forking.end()


def _tell(directory: str, name: str, number: int) -> None:
    Path(directory, f"{name}.partial").write_text(str(number))
    Path(directory, f"{name}.partial").rename(Path(directory, name))


def _serve(modules: list[str]) -> dict[str, Any] | None:
    """Import, and fork as standard input asks; a forked process gets what it was asked for."""
    for module in modules:
        import_module(module)
    # The collector would touch, and so copy, every page of what was imported in every process.
    gc.collect()
    gc.freeze()
    # Ctrl-C is for the tests: they end what they started.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        if os.fork():
            continue
        if not (pid := os.fork()):
            return asked
        # One process for each waits for it, so that the first one can go on forking.
        _tell(asked["directory"], "pid", pid)
        _, status = os.waitpid(pid, 0)
        _tell(asked["directory"], "status", os.waitstatus_to_exitcode(status))
        os._exit(0)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return None


def _become(asked: dict[str, Any]) -> None:
    """Take on streams, arguments and environment of one's own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["words"]
    for stream, path in enumerate(
        (os.devnull, f"{asked['directory']}/output", f"{asked['directory']}/errors")
    ):
        opened = os.open(path, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)


if __name__ == "__main__":
    if (asked := _serve(sys.argv[1:])) is not None:
        _become(asked)
        exec(compile(asked["code"], "<forked>", "exec"), {"__name__": "__main__"})
