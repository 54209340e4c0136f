"""Training settings."""

import math
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from mlsae.base.errors import InputError
from mlsae.base.settings import ReadsStores, device_setting, flag, setting, settings
from mlsae.base.units import (
    check_not_negative,
    check_seed,
    parse_bytes,
    parse_count,
    parse_layers,
    parse_numbers,
)
from mlsae.sae.architectures import ArchitectureSettings, get, registered
from mlsae.sae.config import LAYER_SCALES, NORMALIZE
from mlsae.train.step.objective import LOSS_SPACES
from mlsae.train.step.schedule import SCHEDULES

PRECISIONS = ("float32", "bfloat16")
DISTRIBUTE = ("rows", "saes")
TRACKERS = ("tensorboard", "wandb")
DEFAULT_EXPANSION_FACTOR = 64
_PEAK_LR, _LR_LATENTS, _LR_TRAVEL, _LEAST_LR_STEPS = 2e-4, 2**14, 2**25, 2**11
_BATCH_ROWS, _WANTED_STEPS = (512, 16384), 2000
_VALIDATION_FRACTION, _VALIDATION_SEQUENCES, _MOST_VALIDATION = 0.01, 64, 0.05
_OF_PAPER: dict[str, tuple[object, ...]] = {
    "architecture": ("topk",),
    "normalize": ("standardize", "none"),
    "layer_scale": ("none",),
    "layer_weights": (None,),
    "matryoshka": (None,),
}
"""Settings that the preset can be combined with."""

EACH = "each"
Layers = tuple[tuple[int, ...] | None, bool]
"""Layers to train on, None for all, and whether each gets an SAE of its own besides."""


def parse_training_layers(text: str) -> Layers:
    """`0-5`, `each` or `0-5,each`: layers as `parse_layers` reads them, and `each`.

    Raises:
        InputError: neither.
    """
    words = [word.strip() for word in text.split(",")]
    others = [word for word in words if word != EACH]
    try:
        return parse_layers(",".join(others)) if others else None, len(others) < len(words)
    except InputError as error:
        raise InputError(f"{error}; `{EACH}` adds an SAE for each layer") from None


@settings
class TrainConfig(ArchitectureSettings, ReadsStores):
    """Settings for a training run, with those that architectures have.

    Raises:
        InputError: a value is out of range, or two exclude each other.
    """

    site: str | None = setting(
        default=None,
        unset="the store's only one",
        decides=True,
        group="Data",
        doc="Site to train on; needed where the store holds several.",
    )
    layers: tuple[int, ...] | None = setting(
        default=None,
        unset="all of the store",
        decides=True,
        group="Data",
        parse=parse_training_layers,
        metavar="LAYERS",
        doc="Layers to train on, such as 0-5; `each` adds an SAE for each layer.",
    )
    validation_fraction: float | None = setting(
        default=None,
        unset="1%, or more for 64 sequences, up to 5%",
        decides=True,
        group="Data",
        doc="Share of sequences held out for validation, from 0 to below 1.",
    )
    skip_positions: int = setting(
        default=1,
        decides=True,
        group="Data",
        parse=parse_count,
        doc="First positions in a sequence that are neither trained on nor counted, 0 to 16.",
    )
    data_seed: int | None = setting(
        default=None,
        unset="the first --seed",
        decides=True,
        group="Data",
        doc="Seed for the order of rows and for the sequences held out.",
    )
    window: int | None = setting(
        default=None,
        unset="slices of 64KiB",
        decides=True,
        group="Data",
        parse=parse_bytes,
        doc="Memory for the window in which rows are shuffled, over all processes, such as 1GiB.",
    )
    expansion_factor: int | None = setting(
        default=None,
        unset="64",
        gives_way_to=("num_latents",),
        decides=True,
        group="SAE",
        short="-R",
        swept=True,
        parse=parse_count,
        doc="Latents a channel.",
    )
    num_latents: int | None = setting(
        default=None,
        unset="by --expansion-factor",
        gives_way_to=("expansion_factor",),
        decides=True,
        group="SAE",
        swept=True,
        parse=parse_count,
        doc="Latents, instead of --expansion-factor.",
    )
    normalize: str = setting(
        default="standardize",
        decides=True,
        group="SAE",
        swept=True,
        doc="Normalisation for rows: standardize, none, scale or center.",
    )
    layer_scale: str = setting(
        default="none",
        gives_way_to=("normalize",),
        decides=True,
        group="SAE",
        swept=True,
        doc="Scale for each layer from all layers' mean norms, with --normalize none: none, log, "
        "sqrt or linear.",
    )
    seed: int = setting(
        default=0, decides=True, group="SAE", swept=True, doc="Seed for the initial weights."
    )
    preset: str | None = setting(
        default=None,
        unset="none",
        decides=True,
        group="Optimisation",
        doc="paper: the training step from the published multi-layer SAEs.",
    )
    loss_space: str = setting(
        default="standardized",
        decides=True,
        group="Optimisation",
        swept=True,
        doc="Rows in which the reconstruction error is measured: standardized or raw.",
    )
    layer_weights: tuple[float, ...] | None = setting(
        default=None,
        unset="1 each",
        by_layer=True,
        decides=True,
        group="Optimisation",
        parse=parse_numbers,
        doc="Weight in the loss for each layer's reconstruction error, as 1,1,2.",
    )
    batch_size: int | None = setting(
        default=None,
        unset="the power of two from 512 to 16,384 that leaves 2,000 steps",
        decides=True,
        group="Optimisation",
        parse=parse_count,
        doc="Rows a step, over all layers and processes.",
    )
    epochs: int | None = setting(
        default=None,
        unset="1",
        gives_way_to=("max_rows",),
        decides=True,
        group="Optimisation",
        parse=parse_count,
        doc="Passes over the rows.",
    )
    max_rows: int | None = setting(
        default=None,
        unset="by --epochs",
        gives_way_to=("epochs",),
        decides=True,
        group="Optimisation",
        parse=parse_count,
        doc="Rows to train on instead of --epochs, such as 100M, a row at each layer counting for "
        "itself; the last batch is whole.",
    )
    lr: float | None = setting(
        default=None,
        unset="2e-4 / √(num_latents / 2¹⁴), more in short runs",
        decides=True,
        group="Optimisation",
        swept=True,
        doc="Peak learning rate.",
    )
    schedule: str = setting(
        default="linear",
        decides=True,
        group="Optimisation",
        swept=True,
        doc="Fall of the learning rate: linear, cosine, or constant for none.",
    )
    lr_decay: float | None = setting(
        default=None,
        unset="0.2, or all after the warm-up for cosine",
        gives_way_to=("schedule",),
        decides=True,
        group="Optimisation",
        swept=True,
        doc="Last share of steps, over which the learning rate falls to 0.",
    )
    warmup: float = setting(
        default=0.1,
        decides=True,
        group="Optimisation",
        swept=True,
        doc="First share of steps, over which the learning rate rises.",
    )
    clip_grad_norm: float | None = setting(
        default=None,
        unset="any",
        decides=True,
        group="Optimisation",
        doc="Largest L2 norm for a step's gradient.",
    )
    out: Path = setting(
        decides=False,
        group="Run",
        doc="Directory for the SAE, or for several, with log, checkpoints and curves.",
    )
    precision: str = setting(
        default="float32",
        decides=True,
        group="Run",
        swept=True,
        doc="Precision for the encoder product in training: float32, or bfloat16 with candidates "
        "re-scored in float32.",
    )
    # Another number rounds sums differently, as another device or process count does. A run
    # that ran out of memory or moved must still go on, so rounding does not belong to its identity.
    micro_batch: int | None = setting(
        default=None,
        unset="all",
        decides=False,
        group="Run",
        parse=parse_count,
        doc="Batch rows in memory at once; a run may go on with another number, which rounds "
        "sums differently.",
    )
    device: str = device_setting()
    distribute: str = setting(
        default="rows",
        decides=False,
        group="Run",
        doc="Work shared between several processes: rows within a batch, or saes within a sweep.",
    )
    resume: bool = setting(
        default=False,
        decides=False,
        group="Run",
        doc="Continue the run in --out from its last checkpoint.",
    )
    keep: int = setting(
        default=2, decides=False, group="Run", parse=parse_count, doc="Checkpoints to keep."
    )
    checkpoint_seconds: float = setting(
        default=300.0, decides=False, group="Run", doc="Seconds between checkpoints, at least."
    )
    track: str | None = setting(
        default=None,
        unset="none",
        decides=False,
        group="Run",
        doc="Service that receives the log too: tensorboard or wandb.",
    )

    def __post_init__(self) -> None:
        for first, second in (("expansion_factor", "num_latents"), ("epochs", "max_rows")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise InputError(f"give {self._flag(first)} or {self._flag(second)}, not both")
        counts = ("expansion_factor", "num_latents", "epochs", "max_rows")
        for name in (*counts, "batch_size", "micro_batch", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{self._flag(name)} must be at least 1, got {value}")
        for name in ("lr", "clip_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{self._flag(name)} must be above 0, got {value}")
        for name in ("lr_decay", "warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(
                    f"{self._flag(name)} is a share of the steps from 0 to 1, got {value}"
                )
        for name in ("seed", "data_seed"):
            check_seed(self._flag(name), getattr(self, name))
        if self.schedule == "constant" and self.lr_decay:
            raise InputError(
                f"a constant --schedule has no decay, got --lr-decay {self.lr_decay}: leave one out"
            )
        for name, choices in (
            ("loss_space", LOSS_SPACES),
            ("precision", PRECISIONS),
            ("distribute", DISTRIBUTE),
            ("schedule", SCHEDULES),
            ("track", (*TRACKERS, None)),
        ):
            if getattr(self, name) not in choices:
                self._refuse_choice(name, tuple(filter(None, choices)))
        self._check_sae()

    def _check_sae(self) -> None:
        for name, choices in (
            ("architecture", tuple(kind.name for kind in registered())),
            ("normalize", NORMALIZE),
            ("layer_scale", LAYER_SCALES),
        ):
            if getattr(self, name) not in choices:
                self._refuse_choice(name, choices)
        if self.preset not in (None, "paper"):
            raise InputError(f"--preset must be paper, got {self.preset!r}")
        for kind in registered():
            if isinstance(self, kind.settings):
                kind.check_values(self)
        check_not_negative(self._flag("layer_weights"), self.layer_weights)

    def _flag(self, name: str) -> str:
        return flag(type(self), name)

    def _refuse_choice(self, name: str, choices: tuple[str, ...]) -> NoReturn:
        raise InputError(
            f"{self._flag(name)} must be {' or '.join(choices)}, got {getattr(self, name)!r}"
        )

    def check_together(self) -> None:
        """Refuse values that exclude each other in one SAE.

        Raises:
            InputError: two exclude each other.
        """
        if self.preset is not None:
            for name, values in _OF_PAPER.items():
                if getattr(self, name) not in values:
                    allowed = ["nothing" if value is None else str(value) for value in values]
                    raise InputError(
                        f"--preset paper has {' or '.join(allowed)} for {self._flag(name)}, got "
                        f"{getattr(self, name)}: leave it out"
                    )
        chosen = get(self.architecture)
        chosen.check_chosen(self)
        self._check_others()
        if self.precision not in chosen.precisions:
            others = [kind.name for kind in registered() if self.precision in kind.precisions]
            raise InputError(
                f"--precision {self.precision} is for --architecture {' or '.join(others)}; "
                f"{chosen.name} takes {' or '.join(chosen.precisions)}"
            )
        if self.layer_scale != "none" and self.normalize != "none":
            raise InputError(
                f"--layer-scale {self.layer_scale} takes rows as they are: it needs --normalize "
                f"none, got {self.normalize}"
            )

    def _check_others(self) -> None:
        """Refuse settings that belong to other architectures."""
        own = {field.name for field in fields(get(self.architecture).settings)}
        owners: dict[str, list[str]] = {}
        for kind in registered():
            for field in fields(kind.settings):
                if field.default is None and getattr(self, field.name, None) is not None:
                    owners.setdefault(field.name, []).append(kind.name)
        for name, kinds in owners.items():
            if name not in own:
                either = " or ".join(kinds)
                raise InputError(
                    f"{self._flag(name)} belongs to --architecture {either}, got "
                    f"{self.architecture}: leave it out, or choose {either}"
                )

    def latents(self, d_in: int) -> int:
        """Latents for rows with `d_in` channels."""
        if self.num_latents is not None:
            return self.num_latents
        return d_in * (self.expansion_factor or DEFAULT_EXPANSION_FACTOR)

    @property
    def decay(self) -> float:
        """Last share of steps, over which the learning rate falls."""
        if self.lr_decay is not None:
            return self.lr_decay
        return {"constant": 0.0, "linear": 0.2, "cosine": 1 - self.warmup}[self.schedule]

    @property
    def order_seed(self) -> int:
        """Seed for the row order and the validation split."""
        return self.seed if self.data_seed is None else self.data_seed

    def batch_rows(self, epoch_rows: int) -> int:
        """Rows of a batch where none are chosen, over layers and processes.

        The batch halves from 16,384 rows until the run has 2,000 steps, down to 512.

        Args:
            epoch_rows: rows of an epoch, over layers.
        """
        rows = (self.epochs or 1) * epoch_rows if self.max_rows is None else self.max_rows
        least, size = _BATCH_ROWS
        while size > least and rows < _WANTED_STEPS * size:
            size //= 2
        return size

    def held_out_fraction(self, num_sequences: int) -> float:
        """Share of the sequences held out: 1% unless chosen, or up to 5% for 64 sequences."""
        if self.validation_fraction is not None:
            return self.validation_fraction
        share = _VALIDATION_SEQUENCES / num_sequences
        return max(_VALIDATION_FRACTION, min(_MOST_VALIDATION, share))

    def peak_lr(self, num_latents: int, d_in: int, num_steps: int) -> float:
        """Learning rate at the plateau.

        Unless chosen, 2e-4 / √(num_latents / 2¹⁴), as published for long runs, times
        √(2²⁵ / (d_in · num_steps)) where that is above 1 and num_steps counts as 2¹¹ at least.
        Adam turns a direction of unit length by about lr · √d_in a step, so a short run with the
        published rate ends on the way. Measured in docs/evidence/defaults.md.
        """
        if self.lr is not None:
            return self.lr
        steps = max(num_steps, _LEAST_LR_STEPS)
        shorter = max(1.0, math.sqrt(_LR_TRAVEL / (d_in * steps)))
        return _PEAK_LR / math.sqrt(num_latents / _LR_LATENTS) * shorter
