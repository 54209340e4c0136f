"""Printing never costs the work, and progress fits a terminal and a log alike."""

import ast
import contextlib
import io
import os
import pty
import struct
import sys
import termios
from fcntl import ioctl
from itertools import islice, pairwise
from pathlib import Path

import pytest

from mlsae.base.output.console import Progress, line_times, say
from mlsae.base.units import format_duration, format_short

ROOT = Path(__file__).resolve().parents[2]


def test_lines_of_a_log_come_a_minute_apart_and_never_more_than_five(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Other tests may have loaded a kernel.
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    times = list(islice(line_times(), 500))
    assert times[0] == 10
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps) == 60
    assert max(gaps) == 300
    assert gaps == sorted(gaps)


@pytest.mark.parametrize(
    ("total", "unit", "done", "line"),
    [
        (10_000_000, "token", 1_230_000, "s: 1.23M of 10M tokens, 12%, 20.5k/s, 7 min left, a, b"),
        (None, "token", 600, "s: 600 tokens, 10/s, a, b"),
        (1_000_000, "B", 3_000, "s: 3 kB of 1 MB, 0%, 50 B/s, 5 h 32 min left, a, b"),
        (None, "", 0, "s: 60 s so far"),
        (10, "figure", 0, "s: 0 of 10 figures, 0%, none in 60 s, a, b"),
    ],
)
def test_line_has_amount_rate_and_time_left(
    total: int | None, unit: str, done: int, line: str
) -> None:
    progress = Progress("s", total, unit)
    progress.update(done)
    progress.note("a", "b")
    assert progress.line(60.0) == line


def test_rate_counts_this_run_alone() -> None:
    progress = Progress("s", 1000, "row", done=500)
    progress.update(100)
    assert progress.line(10.0) == "s: 600 of 1k rows, 60%, 10/s, 40 s left"


def test_log_has_lines_without_carriage_returns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one comes although the stage hangs; a short stage has none."""
    with Progress("short", 5, "row") as progress:
        progress.update(5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("mlsae.base.output.console.line_times", lambda: iter([0.0, 0.0, 1e6]))
    with Progress("train", 5, "row") as progress:
        assert progress._thread is not None
        progress._thread.join(0.2)
    error = capsys.readouterr().err
    assert error.count("train: 0 of 5 rows") == 2
    assert "\r" not in error


@pytest.mark.parametrize("columns", [0, 60, 80, 200])
def test_terminal_shows_a_bar_whatever_the_notes(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wide as the terminal, or 80 columns where it says that it has none."""
    monkeypatch.delenv("COLUMNS", raising=False)
    master, slave = pty.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("decoder directions", 10**9, "token") as progress:
            progress.update(5 * 10**8)
            progress.note("fvu 0.1234–0.2345", "L0 32.0", "dead 12.3%", "and so on")
            progress._bar.refresh()
    shown = b""
    with contextlib.suppress(OSError):  # The other end is closed.
        while piece := os.read(master, 4096):
            shown += piece
    os.close(master)
    last = shown.decode().rstrip("\r\n").split("\r")[-1]
    width = columns or 80
    assert len(last) <= width
    assert last.startswith("decoder directions  50%|")
    assert last.count("█") >= (3 if width > 60 else 0)
    assert ("dead 12.3%" in last) == (columns == 200)


def test_nothing_is_shown_where_nothing_is_to_be_done() -> None:
    for progress in (Progress("s", 0, "row"), Progress("s", 5, "row", shown=False)):
        with progress:
            assert (progress._bar, progress._thread) == (None, None)


def test_letters_that_a_console_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    say("layers 0–5, × 你")
    assert raw.getvalue() == b"layers 0-5, \xd7 \\u4f60\n"


def test_reader_that_has_gone_and_a_full_disk_cost_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, write = os.pipe()
    os.close(read)
    for place in (write, "/dev/full"):
        with open(place, "w") as stream:  # noqa: PTH123 - one is a number.
            monkeypatch.setattr(sys, "stdout", stream)
            say("one")
            say("two")


def test_times_and_counts_are_short() -> None:
    seconds = (0.4, 42, 99.4, 100, 3599, 4320, 86399, 200_000)
    assert [format_duration(value) for value in seconds] == [
        "0 s", "42 s", "99 s", "2 min", "1 h 0 min", "1 h 12 min", "1 d 0 h", "2 d 8 h",
    ]  # fmt: skip
    counts = (0, 0.123, 999, 999.6, 1234, 999_600, 1.2e13)
    assert [format_short(value) for value in counts] == [
        "0", "0.123", "999", "1k", "1.23k", "1M", "12T",
    ]  # fmt: skip


def test_every_stage_has_its_progress_from_here() -> None:
    """No bar of another make, which would fill a log with carriage returns."""
    others = set()
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0].startswith(".") or "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tqdm"):
                others.add(str(path.relative_to(ROOT)))
    assert others == {"base/output/console.py"}
