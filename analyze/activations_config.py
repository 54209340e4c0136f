"""The settings of `mlsae activations`."""

from dataclasses import dataclass
from pathlib import Path

from mlsae.analyze.config import ROWS
from mlsae.base.errors import InputError
from mlsae.store.read.corpus import Location

PART_EVENTS = 2**22
"""Events that are held, sorted and written together, unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class ActivationsConfig:
    """Whose events to write, over which rows, and where.

    Raises:
        InputError: `rows` is not one of its choices, or a size is below 1.
    """

    cache: Location | tuple[Location, ...]
    """The activation store that is read, by directory or URL; several of one model and different
    text, in any order, are one corpus."""

    sae: Path
    """The directory of the trained SAE."""

    out: Path
    """The directory to be written; absent, empty, or one that the same settings began."""

    rows: str = "validation"
    """Which sequences: those held out from training, the others, or all."""

    max_tokens: int | None = None
    """At most this many tokens, in whole sequences from the first; None is all of `rows`."""

    batch_size: int = 4096
    """Rows encoded at once."""

    part_events: int = PART_EVENTS
    """About the most events of a file: what is sorted in memory, and lost when a run is killed."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: CUDA where there is one."""

    cache_dir: Path | None = None
    """Where parts of remote stores are kept; None for the user's cache."""

    cache_size: int | None = None
    """Most bytes kept there; None for 10 GiB."""

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise InputError(f"rows: expected one of {', '.join(ROWS)}; got {self.rows!r}")
        for name in ("max_tokens", "batch_size", "part_events"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")
