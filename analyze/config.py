"""Settings of an analysis, and of the events alone."""

from dataclasses import dataclass
from pathlib import Path

from mlsae.base.errors import InputError
from mlsae.base.files import Location

ROWS = ("validation", "train", "all")

PART_EVENTS = 2**22
"""Events that are held, sorted and written together, unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """What to analyze, over which rows, and where to write it.

    Raises:
        InputError: `rows` is not one of its choices, or a size is below 1.
    """

    cache: Location | tuple[Location, ...]
    """The activation store that is read, by directory or URL; several of one model and different
    text, in any order, are one corpus."""

    sae: Path
    """The directory of the trained SAE."""

    out: Path
    """The directory to be written; absent, empty, or an analysis, which is then replaced."""

    rows: str = "validation"
    """Which sequences: those held out from training, the others, or all."""

    max_tokens: int | None = None
    """At most this many tokens, in whole sequences from the first; None is all of `rows`."""

    model: Path | None = None
    """Directory of the transformer for the cross-entropy family; None is the store's own."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: CUDA where there is one."""

    batch_size: int = 4096
    """Rows encoded at once."""

    ce_max_tokens: int = 1_000_000
    """The cross-entropy family is measured on at most this many tokens of those evaluated."""

    events_max_tokens: int = 1_000_000
    """The table `activations` covers at most this many tokens of those evaluated."""

    decomposition_max_tokens: int = 1_000_000
    """What takes all layers of a token at once (the variance decomposition, the entropy over token
    ids) is measured on at most this many tokens of those evaluated."""

    examples: int = 16
    """The table `examples` holds so many of a latent's largest values, over all layers and at each
    of them; 0 for no table."""

    samples: int = 4
    """It holds so many more from each quarter of the latent's range of values, drawn at random."""

    context_tokens: tuple[int, int] = (8, 4)
    """Tokens of an example before its peak, and after it."""

    examples_seed: int = 0
    """Seed of the random ones."""

    prompts: tuple[str, ...] = ()
    """Texts to run the transformer on, each alone, for the table `prompts` and a figure each."""

    prompt_file: Path | None = None
    """A UTF-8 file of more of them, one a line."""

    figures: bool = True
    """Whether the figures are drawn; `Analysis.figure` draws any of them at any time."""

    to_delphi: Path | None = None
    """Directory for the events as a latent cache of Delphi; None writes none."""

    cache_dir: Path | None = None
    """Where parts of remote stores are kept; None for the user's cache."""

    cache_size: int | None = None
    """Most bytes kept there; None for 10 GiB."""

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise InputError(f"rows: expected one of {', '.join(ROWS)}; got {self.rows!r}")
        for name in (
            "max_tokens",
            "batch_size",
            "ce_max_tokens",
            "events_max_tokens",
            "decomposition_max_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")
        for name in ("examples", "samples"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if not (len(self.context_tokens) == 2 and all(n >= 0 for n in self.context_tokens)):
            raise InputError(
                f"context_tokens: expected two numbers of at least 0, got {self.context_tokens}"
            )


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
