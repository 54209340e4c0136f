"""Ctrl-C and SIGTERM: once, work ends at the next whole piece; twice, at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mlsae.base.errors import MlsaeError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 0.25
"""A launcher passes on the Ctrl-C that its processes have from the terminal: it counts once."""


class InterruptedWorkError(MlsaeError):
    """The user stopped the work; the message names what is kept and the way to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number
        """Exit status of the command line: 128 plus the signal, as in shells."""


class StopNow(KeyboardInterrupt):
    """Leaves the work at once, as Ctrl-C does without this module."""


class Interruption:
    """State of a request to stop."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        """The signal that came, if one did."""
        self._announcement: str | None = None
        self._received = float("-inf")

    @property
    def requested(self) -> bool:
        """True once a signal came: stop after the piece in hand."""
        return self.signal_number is not None

    @contextmanager
    def deferred(self, announcement: str) -> Iterator[None]:
        """A stretch in which the first signal only asks, and is answered by `announcement`."""
        self._announcement = announcement
        try:
            yield
        finally:
            self._announcement = None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        again, now = self.requested, time.monotonic()
        if again and now - self._received < ECHO_SECONDS:
            return
        self.signal_number, self._received = number, now
        if self._announcement is None or again:
            raise StopNow
        # A handler may run inside a print, which is not reentrant.
        os.write(2, f"\n{self._announcement}\n".encode())


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Receive SIGINT and SIGTERM in the main thread until the block is left."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption._receive) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
