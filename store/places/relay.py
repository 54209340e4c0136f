"""Reading from elsewhere in a forked process, through a process of its own.

The network library has threads that a fork does not take along, so that a request of the forked
process would wait for ever. There a second process, which begins anew, asks in its place.
"""

import os
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Any

from mlsae.store.errors import RemoteError

_START = "import sys; from mlsae.store.places.relay import serve; serve()"


class Forks:
    """Knowledge of the process that has begun to use the network library."""

    def __init__(self) -> None:
        self._owner: int | None = None

    @property
    def is_forked(self) -> bool:
        """True where a process before this one has used the library and was forked."""
        return self._owner is not None and self._owner != os.getpid()

    def use(self) -> None:
        """Take note that this process uses the library."""
        if self._owner is None:
            self._owner = os.getpid()


FORKS = Forks()


class Relay:
    """Calls of an object's methods in another process, one at a time. Threads may share it.

    Args:
        objects: object that can be pickled.
    """

    def __init__(self, objects: Any) -> None:
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._send(objects)

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is None or not self.is_own:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                stream.close()
        process.wait()

    @property
    def is_own(self) -> bool:
        """True in the process that made it."""
        return self._owner == os.getpid()

    def call(self, method: str, *arguments: Any) -> Any:
        """Result of a method.

        Raises:
            Exception: the method's own.
            RemoteError: the process has ended.
        """
        try:
            with self._lock:
                self._send((method, arguments))
                assert self._process.stdout is not None
                result, error = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            raise RemoteError(
                "the process that reads in place of this forked one has ended: start workers by "
                "spawn instead, or see why it ended"
            ) from None
        if error is not None:
            raise error
        return result

    def _send(self, what: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(what, self._process.stdin)
        self._process.stdin.flush()


def serve() -> None:
    """Answer calls on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever is printed on the way goes where errors go.
    os.dup2(2, 1)
    calls: IO[bytes] = sys.stdin.buffer
    objects = pickle.load(calls)
    while True:
        try:
            method, arguments = pickle.load(calls)
        except EOFError:
            return
        result = failure = None
        try:
            result = getattr(objects, method)(*arguments)
        except Exception as error:
            failure = error
        pickle.dump((result, failure), answers)
        answers.flush()
