"""Lines and progress on the console: a bar on a terminal, in a log a line now and then."""

import codecs
import contextlib
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
from tqdm import tqdm

from mlsae.base.units import format_bytes, format_duration, format_short

PLAIN = "mlsae.plain"
"""Name of the error handler for letters that the encoding of a console lacks."""
_LIKE = {"–": "-", "−": "-", "…": "...", "×": "x", "≤": "<=", "≥": ">=", "→": "->", "·": "."}
FIRST_SECONDS, FEWEST_SECONDS, MOST_SECONDS = 10.0, 60.0, 300.0
"""A log has its first line after so long, then one a minute; after ten minutes fewer and fewer, but
at least one every five minutes."""
_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {rate_fmt}, {remaining} left{postfix}"
_NUMBERS_COLUMNS = len(" 100%|| 1.23M/1.23M 1.23k s/s, 1:00:00 left")
_BAR_COLUMNS = 10
"""Room for the bar itself, before notes have any."""


def say(text: str, *, err: bool = False) -> None:
    """Print text, which never costs the work.

    Letters that the console lacks are escaped; where its reader has gone, or a log's disk is full,
    nothing more is printed.
    """
    stream = sys.stderr if err else sys.stdout
    try:
        # A bar on the terminal is drawn again below the text.
        with tqdm.external_write_mode(stream):
            try:
                click.echo(text, err=err)
            except UnicodeEncodeError:
                encoding = stream.encoding
                click.echo(text.encode(encoding, PLAIN).decode(encoding), err=err)
    except OSError:
        with contextlib.suppress(OSError):
            descriptor = stream.fileno()
            with open(os.devnull, "wb") as null:  # noqa: PTH123 - no path of the user's.
                os.dup2(null.fileno(), descriptor)


def escape_what_is_lacking() -> None:
    """Let both streams of this process escape letters that their encodings lack."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=PLAIN)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Text in place of letters that an encoding lacks: signs of ASCII like them, or escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(
        _LIKE.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking
    ), error.end


codecs.register_error(PLAIN, _plain)


class Progress:
    """Progress of a stage: a bar where standard error is a terminal, else lines.

    A line comes from a thread of its own, so that a stage that hangs says so, too.

    Args:
        stage: name of the stage, such as `harvest`.
        total: items of the whole stage; None where unknown. A stage of none shows nothing.
        unit: word for one item, such as `token`, or `B` for bytes; empty for a stage that is one
            piece of work, of which only the time is known.
        done: items that an earlier run did.
        shown: False shows nothing.
    """

    def __init__(
        self, stage: str, total: int | None, unit: str, *, done: int = 0, shown: bool = True
    ) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self._before = done
        """Items so far."""
        self._shown = shown and total != 0
        self._notes: Sequence[str] = ()
        self._bar: Any = None
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        if not self._shown:
            return self
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(
                desc=self.stage,
                total=self.total,
                initial=self.done,
                unit="B" if self.unit == "B" else f" {self.unit}s",
                unit_scale=True,
                bar_format=self._bar_format(),
                leave=bool(self.unit),
                dynamic_ncols=_fixed_columns() is None,
                ncols=_fixed_columns(),
            )
        else:
            self._thread = threading.Thread(target=self._write_lines, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._thread is not None:
            self._ended.set()
            self._thread.join()

    def update(self, count: int) -> None:
        """Count more items as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def note(self, *notes: str) -> None:
        """Show these notes behind the numbers; on a terminal as many as leave room for the bar."""
        self._notes = notes
        if self._bar is not None:
            columns = _fixed_columns() or os.get_terminal_size(sys.stderr.fileno()).columns
            room = columns - len(self.stage) - len(self.unit) - _NUMBERS_COLUMNS - _BAR_COLUMNS
            self._bar.set_postfix_str(", ".join(_fitting(notes, room)), refresh=False)

    def _bar_format(self) -> str | None:
        if not self.unit:
            return "{desc} …"
        return None if self.total is None else _BAR

    def line(self, seconds: float) -> str:
        """A line for a log, `seconds` after the stage began."""
        if not self.unit:
            return f"{self.stage}: {format_duration(seconds)} so far"
        count = format_bytes if self.unit == "B" else format_short
        word = "" if self.unit == "B" else f" {self.unit}s"
        of = "" if self.total is None else f" of {count(self.total)}"
        parts = [f"{count(self.done)}{of}{word}"]
        rate = (self.done - self._before) / seconds if seconds else 0.0
        if self.total is not None:
            parts.append(f"{self.done / self.total:.0%}")
        if rate:
            parts.append(f"{count(rate)}/s")
            if self.total is not None:
                left = max(self.total - self.done, 0) / rate
                parts.append(f"{format_duration(left)} left")
        else:
            parts.append(f"none in {format_duration(seconds)}")
        return f"{self.stage}: {', '.join([*parts, *self._notes])}"

    def _write_lines(self) -> None:
        for seconds in line_times():
            if self._ended.wait(max(self._began + seconds - time.monotonic(), 0)):
                return
            say(self.line(time.monotonic() - self._began), err=True)


def line_times() -> Iterator[float]:
    """Seconds from the beginning of a stage at which a log has lines."""
    # A notebook keeps all that is printed, so short stages leave nothing there.
    at = FEWEST_SECONDS if "ipykernel" in sys.modules else FIRST_SECONDS
    while math.isfinite(at):
        yield at
        at += min(max(FEWEST_SECONDS, at // 600 * FEWEST_SECONDS), MOST_SECONDS)


def _fixed_columns() -> int | None:
    """Columns for a terminal that says it has 0, as in containers; None where it knows."""
    if os.get_terminal_size(sys.stderr.fileno()).columns:
        return None
    return shutil.get_terminal_size().columns


def _fitting(notes: Sequence[str], room: int) -> list[str]:
    """The first notes that fit, with commas before them."""
    fitting: list[str] = []
    for note in notes:
        room -= len(note) + 2
        if room < 0:
            break
        fitting.append(note)
    return fitting
