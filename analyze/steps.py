"""Steps of an analysis that are done, kept until its tables are whole: a stopped one goes on."""

import io
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.directories import KEPT
from mlsae.base.files import canonical_json, write_durably
from mlsae.base.interruption import InterruptedWorkError, Interruption, StopNow

Arrays = Mapping[str, npt.NDArray[Any]]

_EVERY_SECONDS = 60.0
"""Time between two states of a step that is kept while it lasts."""
_FACTS = "facts"


class Steps:
    """Files of arrays and facts, one a step, in a folder that `staged` keeps.

    Args:
        directory: the staged folder.
        interruption: requests to stop.
    """

    def __init__(self, directory: Path, interruption: Interruption) -> None:
        self._folder, self._interruption = directory / KEPT, interruption
        self._kept_at = time.monotonic()

    def read(self, name: str) -> tuple[dict[str, Any], Arrays] | None:
        """Facts and arrays of a step; None where there are none, or damaged ones."""
        try:
            path = self._folder / f"{name}.npz"
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            facts = json.loads(arrays.pop(_FACTS).tobytes())
        except (FileNotFoundError, zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError):
            return None
        return facts, arrays

    def keep(self, name: str, facts: Mapping[str, Any], arrays: Arrays) -> None:
        """Write a step's result durably, in place of an earlier one."""
        self._folder.mkdir(exist_ok=True)
        file = io.BytesIO()
        told = np.frombuffer(canonical_json(facts), dtype=np.uint8)
        np.savez(file, allow_pickle=False, **{_FACTS: told}, **arrays)
        write_durably(self._folder / f"{name}.npz", file.getvalue())
        self._kept_at = time.monotonic()

    def keep_now_and_then(self, name: str, arrays: Callable[[], Arrays]) -> None:
        """Keep the state of a step that lasts, once a minute and where a stop was asked for.

        Raises:
            StopNow: a stop was asked for; the state is kept.
        """
        if self._interruption.requested or time.monotonic() - self._kept_at > _EVERY_SECONDS:
            self.keep(name, {}, arrays())
        if self._interruption.requested:
            raise StopNow


@contextmanager
def stops(interruption: Interruption, line: str) -> Iterator[None]:
    """A stretch of work that a stop ends with a line for the user.

    Args:
        interruption: requests to stop.
        line: says what is kept and how to go on.

    Raises:
        InterruptedWorkError: with that line.
    """
    try:
        yield
    except StopNow:
        assert interruption.signal_number is not None
        raise InterruptedWorkError(line, interruption.signal_number) from None
