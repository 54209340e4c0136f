"""Settings for an analysis, and for the events alone."""

from pathlib import Path

from mlsae.base.embedded import embedded_model
from mlsae.base.errors import InputError
from mlsae.base.settings import ReadsStores, device_setting, flag, setting, settings
from mlsae.base.units import check_seed, parse_context, parse_count

ROWS = ("validation", "train", "all")

PART_EVENTS = 2**22
"""Events that are held, sorted and written together, unless told otherwise."""


@settings
class OverRows(ReadsStores):
    """Settings for work that runs an SAE over a store's rows.

    Raises:
        InputError: `rows` is not one of its choices, or a size is below 1.
    """

    sae: Path = setting(decides=True, group="Data", doc="Directory of a trained SAE.")
    rows: str = setting(
        default="validation",
        decides=True,
        group="Data",
        doc="Sequences to read: validation, those held out from training; train, the others; or "
        "all.",
    )
    max_tokens: int | None = setting(
        default=None,
        unset="all of --rows",
        decides=True,
        group="Data",
        parse=parse_count,
        doc="Most tokens to read, in whole sequences from the first.",
    )
    batch_size: int = setting(
        default=4096,
        decides=True,
        group="Run",
        parse=parse_count,
        doc="Rows encoded at once, which decides the last bits of values.",
    )
    device: str = device_setting(decides=True)

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise InputError(f"--rows must be {' or '.join(ROWS)}, got {self.rows!r}")
        self._at_least(1, "max_tokens", "batch_size")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{flag(type(self), name)} must be at least {least}, got {value}")


@settings
class AnalyzeConfig(OverRows):
    """Settings for an analysis.

    Raises:
        InputError: `rows` is not one of its choices, or a number is out of range.
    """

    out: Path = setting(
        decides=False,
        group="Data",
        doc="Directory for the analysis: absent, empty, or an analysis, which is then replaced.",
    )
    model: Path | None = setting(
        default=None,
        unset="the place that the store names",
        decides=False,
        group="Data",
        doc="Directory with the transformer, where it was moved after the harvest, or demo.",
    )
    ce_max_tokens: int = setting(
        default=1_000_000,
        decides=True,
        group="Measures",
        on_command_line=False,
        doc="Most tokens, among those read, on which the cross-entropy family is measured.",
    )
    events_max_tokens: int = setting(
        default=1_000_000,
        decides=True,
        group="Measures",
        on_command_line=False,
        doc="Most tokens, among those read, that the events table covers.",
    )
    decomposition_max_tokens: int = setting(
        default=1_000_000,
        decides=True,
        group="Measures",
        parse=parse_count,
        doc="Most tokens, among those read, whose layers are compared: for the variance "
        "decomposition and the entropy over token ids.",
    )
    examples: int = setting(
        default=16,
        decides=True,
        group="Examples",
        parse=parse_count,
        doc="Largest values for each latent with their text, over all layers and at each layer; 0 "
        "for no table of examples.",
    )
    samples: int = setting(
        default=4,
        decides=True,
        group="Examples",
        parse=parse_count,
        doc="Further examples from each quarter of a latent's range, drawn at random.",
    )
    context_tokens: tuple[int, int] = setting(
        default=(8, 4),
        decides=True,
        group="Examples",
        parse=parse_context,
        metavar="BEFORE,AFTER",
        doc="Tokens in an example before its peak, and after the peak.",
    )
    examples_seed: int = setting(
        default=0, decides=True, group="Examples", doc="Seed for the examples drawn at random."
    )
    prompts: tuple[str, ...] = setting(
        default=(),
        decides=True,
        group="Prompts",
        again=True,
        option="--prompt",
        doc="Text to run the transformer on, whose latents are written and drawn token by token; "
        "given again, further texts.",
    )
    prompt_file: Path | None = setting(
        default=None,
        unset="none",
        decides=True,
        group="Prompts",
        is_file=True,
        doc="UTF-8 file with texts as for --prompt, one a line.",
    )
    figures: bool = setting(
        default=True,
        decides=True,
        group="Run",
        doc="Draw the figures, which takes seconds; `Analysis.figure` draws any later.",
    )
    to_delphi: Path | None = setting(
        default=None,
        unset="none",
        decides=False,
        group="Data",
        doc="Directory for the events as a latent cache that Delphi reads.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None:
            object.__setattr__(self, "model", Path(embedded_model(str(self.model))))
        self._at_least(1, "ce_max_tokens", "events_max_tokens", "decomposition_max_tokens")
        self._at_least(0, "examples", "samples")
        check_seed("--examples-seed", self.examples_seed)
        if not (len(self.context_tokens) == 2 and all(n >= 0 for n in self.context_tokens)):
            raise InputError(
                f"--context-tokens must be two numbers of at least 0, got {self.context_tokens}"
            )


@settings
class EventsConfig(OverRows):
    """Settings for the events alone.

    Raises:
        InputError: `rows` is not one of its choices, or a size is below 1.
    """

    out: Path = setting(
        decides=False,
        group="Data",
        doc="Directory for the events: absent, empty, or one that the same settings began.",
    )
    part_events: int = setting(
        default=PART_EVENTS,
        decides=True,
        group="Run",
        parse=parse_count,
        doc="Most events a file, about: they are sorted in memory, and lost in a crash.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "part_events")
