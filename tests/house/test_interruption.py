"""Signals in real processes: asked once, work ends at a whole piece; twice, at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import sys, time
from mlsae.base.interruption import StopNow, interruptible
with interruptible() as interruption:
    try:
        with interruption.deferred("finishing"):
            print("ready", flush=True)
            sys.stdin.readline()
            print("asked" if interruption.requested else "not asked", flush=True)
            sys.stdin.readline()
        print("piece done", flush=True)
        sys.stdin.readline()
    except StopNow:
        print("now", interruption.signal_number, flush=True)
"""


@pytest.fixture
def process():
    """Waiting inside a piece of work."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", SCRIPT], text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def finish(process: "subprocess.Popen[str]", lines: int) -> list[str]:
    """Give it `lines` empty lines and read what it says."""
    out, _ = process.communicate("\n" * lines, timeout=60)
    return out.split("\n")[:-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_only_asks(process, number):
    """The piece in hand is finished."""
    process.send_signal(number)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline() == "finishing\n"
    assert finish(process, 3) == ["asked", "piece done"]


def test_second_signal_stops_at_once(process):
    """The piece in hand is not waited for."""
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    process.stderr.readline()
    # A second one within a quarter of a second is taken for a launcher's echo of the first.
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.01)
    assert process.stdout.read() == f"now {int(signal.SIGINT)}\n"


def test_signal_between_pieces_stops_at_once(process):
    """Nothing is in hand."""
    process.stdin.write("\n\n")
    process.stdin.flush()
    assert [process.stdout.readline() for _ in range(2)] == ["not asked\n", "piece done\n"]
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == f"now {int(signal.SIGTERM)}\n"
