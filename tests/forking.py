"""Processes forked from one that has imported already: an import takes longer than most tests.

    with importing("mlsae.harvest.pipeline") as forking:
        process = forking.start("import sys; print(sys.argv[1:])", "one", "two")
        assert process.wait() == 0, process.errors
        process.output

Each has arguments, environment and output of its own, takes signals, and ends as an interpreter
ends, but that nothing is freed, which takes longer than what most of them do. Tests are no package:
they load this file by its path.
"""

import atexit
import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

PATIENCE_SECONDS = 120
_CLIENT = """\
import json, os, sys, tempfile, time

queue, name, *words = sys.argv[1:]
modules = {
    "mlsae": "runpy; runpy.run_module('mlsae', run_name='__main__', alter_sys=True)",
    "torchrun": "torch.distributed.run as run; run.main()",
}
if name == "python" and words[:3] == ["-u", "-m", "mlsae"]:
    # As launchers start it.
    name, words = "mlsae", words[3:]
if name == "python" and words != ["-"]:
    os.execv(sys.executable, [sys.executable, *words])
run = sys.stdin.read() if name == "python" else f"import {modules[name]}"
directory = tempfile.mkdtemp(dir=os.path.dirname(queue))
for stream in ("output", "errors"):
    open(os.path.join(directory, stream), "w").close()
asked = {
    "code": f"import os; os.chdir({os.getcwd()!r})\\n{run}",
    "words": [name, *words],
    "environment": dict(os.environ),
}
with open(os.path.join(directory, "asked"), "w") as file:
    json.dump(asked, file)
with open(queue, "w") as file:
    file.write(directory + "\\n")
while not os.path.exists(status := os.path.join(directory, "status")):
    time.sleep(0.005)
for stream, to in (("output", sys.stdout), ("errors", sys.stderr)):
    to.buffer.write(open(os.path.join(directory, stream), "rb").read())
    to.flush()
sys.exit(int(open(status).read()) % 256)
"""
"""A command that asks for a forked process, waits for it and repeats what it printed."""
_statuses: list[int] = []
"""Status of this process, once its code has run to its end."""


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
    """The process that has imported, and those that were forked from it.

    Args:
        directory: a directory for what they are asked and answer.
        queue: where that process reads directories whose requests it has not met.
    """

    def __init__(self, directory: Path, queue: Path) -> None:
        self._directory, self._queue = directory, queue
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
        }
        (directory / "asked").write_text(json.dumps(asked))
        with self._queue.open("w") as queue:
            queue.write(f"{directory}\n")
        self._processes.append(Process(directory))
        return self._processes[-1]

    def shell(self, directory: Path) -> dict[str, Any]:
        """Options of `subprocess.run` for a shell whose commands are forked.

        They are `mlsae`, `python -`, and `torchrun`, whose ranks are forked too.

        Args:
            directory: an empty directory for the commands.
        """
        client = directory / "client.py"
        client.write_text(_CLIENT)
        for name in ("mlsae", "python", "torchrun"):
            # The line that names an interpreter ends at a space, which paths may have.
            words = shlex.join([sys.executable, "-IS", str(client), str(self._queue), name])
            (directory / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            (directory / name).chmod(0o755)
        path = f"{directory}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        # torch.distributed.run starts that interpreter.
        return {"env": {**os.environ, "PATH": path, "PYTHON_EXEC": str(directory / "python")}}

    def end(self) -> None:
        """Kill what still runs."""
        for process in self._processes:
            process.send_signal(signal.SIGKILL)


@contextmanager
def importing(*modules: str, environment: Mapping[str, str] | None = None) -> Iterator[Forking]:
    """Fork processes that have imported some modules, in an environment that these may read."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory()))
        queue = directory / "queue"
        os.mkfifo(queue)
        server = subprocess.Popen(
            [sys.executable, "-P", __file__, str(queue), *modules],
            env={**os.environ, **(environment or {})},
        )
        stack.enter_context(server)
        # Held open for reading too, which waits for nobody; the server ends when it is closed.
        stack.callback(os.close, os.open(queue, os.O_RDWR))
        forking = Forking(directory, queue)
        stack.callback(forking.end)
        yield forking


def _tell(directory: str, name: str, number: int) -> None:
    Path(directory, f"{name}.partial").write_text(str(number))
    Path(directory, f"{name}.partial").rename(Path(directory, name))


def _serve(queue: TextIO, modules: list[str]) -> tuple[str, dict[str, Any]] | None:
    """Import, and fork as is asked for; a forked process gets its directory and what is asked."""
    for module in modules:
        import_module(module)
    # The collector would touch, and so copy, every page of what was imported in every process.
    gc.collect()
    gc.freeze()
    # Ctrl-C is for the tests: they end what they started.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in queue:
        directory = line.rstrip("\n")
        if os.fork():
            continue
        if not (pid := os.fork()):
            return directory, json.loads(Path(directory, "asked").read_text())
        # One process for each waits for it, so that the first one can go on forking.
        _tell(directory, "pid", pid)
        _, status = os.waitpid(pid, 0)
        _tell(directory, "status", os.waitstatus_to_exitcode(status))
        os._exit(0)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return None


def _run(asked: dict[str, Any]) -> None:
    """Run the code. Its status is known here, where it is none of an uncaught exception."""
    try:
        exec(compile(asked["code"], "<forked>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            _statuses.append(end.code or 0)
        raise
    _statuses.append(0)


def _leave() -> None:
    """End at once with that status: to free all that was imported takes a third of a second."""
    if _statuses:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_statuses[0] % 256)


def _become(directory: str, asked: dict[str, Any]) -> None:
    """Take on streams, arguments and environment of one's own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["words"]
    for stream, path in enumerate((os.devnull, f"{directory}/output", f"{directory}/errors")):
        opened = os.open(path, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)


if __name__ == "__main__":
    # Registered first, so called last: after threads were joined and what others registered.
    atexit.register(_leave)
    # Where nobody writes any more, opening would wait for ever.
    descriptor = os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor) as queue:
        found = _serve(queue, sys.argv[2:])
    if found is None:
        _statuses.append(0)
    else:
        _become(*found)
        _run(found[1])
