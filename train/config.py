"""What a training run is asked to do."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from mlsae.base.errors import InputError
from mlsae.base.files import Location
from mlsae.sae.architectures import ReLUSettings, TopKSettings, get, registered
from mlsae.sae.config import LAYER_SCALES, NORMALIZE
from mlsae.train.step.objective import LOSS_SPACES
from mlsae.train.step.schedule import SCHEDULES

PRECISIONS = ("float32", "bfloat16")
DISTRIBUTE = ("rows", "saes")
TRACKERS = ("tensorboard", "wandb")
DEFAULT_EXPANSION_FACTOR = 64
_PEAK_LR, _LR_LATENTS = 2e-4, 2**14
_OF_PAPER: dict[str, tuple[object, ...]] = {
    "architecture": ("topk",),
    "normalize": ("standardize", "none"),
    "layer_scale": ("none",),
    "layer_weights": (None,),
}
"""What the preset can be combined with."""


@dataclass(frozen=True, kw_only=True)
class WantedSAE(TopKSettings, ReLUSettings):
    """Architecture, penalty and normalisation.

    Raises:
        InputError: a value is out of range, or two exclude each other.
    """

    preset: str | None = None
    """`paper` for the step of the published multi-layer SAEs (train/published/step.py)."""
    architecture: str = "topk"
    """`topk`, or `relu` with an L1 penalty."""
    normalize: str = "standardize"
    """How rows are normalised: `standardize`, `none`, `scale` or `center` (sae/normalize.py)."""
    layer_scale: str = "none"
    """Scale of each layer from the mean norms of all: `none`, `log`, `sqrt` or `linear`."""
    layer_weights: tuple[float, ...] | None = None
    """Weight of each layer's reconstruction error in the loss; None for 1."""

    def check_wanted(self) -> None:
        """Refuse values that are out of range.

        Raises:
            InputError: as of the class.
        """
        for name, choices in (
            ("architecture", [kind.name for kind in registered()]),
            ("normalize", NORMALIZE),
            ("layer_scale", LAYER_SCALES),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"--{name.replace('_', '-')} must be {' or '.join(choices)}, got "
                    f"{getattr(self, name)!r}"
                )
        if self.preset not in (None, "paper"):
            raise InputError(f"--preset must be paper, got {self.preset!r}")
        for kind in registered():
            if isinstance(self, kind.settings):
                kind.check_values(self)
        for name in ("layer_weights", "layer_l1"):
            values = getattr(self, name)
            if values is not None and not all(0 <= value < math.inf for value in values):
                shown = ",".join(f"{value:g}" for value in values)
                raise InputError(
                    f"--{name.replace('_', '-')} takes numbers of at least 0, got {shown}"
                )

    def check_together(self, precision: str) -> None:
        """Refuse values that exclude each other; of a sweep, those of one SAE.

        Args:
            precision: of the encoder product.

        Raises:
            InputError: as of the class.
        """
        if self.preset is not None:
            for name, values in _OF_PAPER.items():
                if getattr(self, name) not in values:
                    allowed = ["nothing" if value is None else str(value) for value in values]
                    raise InputError(
                        f"--preset paper has {' or '.join(allowed)} for "
                        f"--{name.replace('_', '-')}, got {getattr(self, name)}: leave it out"
                    )
        chosen = get(self.architecture)
        chosen.check_chosen(self)
        self._check_others()
        if precision not in chosen.precisions:
            others = [kind.name for kind in registered() if precision in kind.precisions]
            raise InputError(
                f"--precision {precision} selects candidates of {' and '.join(others)}: "
                f"{chosen.name} takes {' or '.join(chosen.precisions)}"
            )
        if self.layer_scale != "none" and self.normalize != "none":
            raise InputError(
                f"--layer-scale {self.layer_scale} takes rows as they are: it needs --normalize "
                f"none, got {self.normalize}"
            )

    def _check_others(self) -> None:
        """Refuse settings of other architectures."""
        own = {field.name for field in fields(get(self.architecture).settings)}
        for kind in registered():
            for field in fields(kind.settings):
                is_given = field.default is None and getattr(self, field.name, None) is not None
                if is_given and field.name not in own:
                    raise InputError(
                        f"--{field.name.replace('_', '-')} is of --architecture {kind.name}, got "
                        f"{self.architecture}"
                    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(WantedSAE):
    """Settings of a training run; every size is in the unit that its docstring names.

    Raises:
        InputError: a value is out of range, or two exclude each other.
    """

    cache: Location | tuple[Location, ...]
    """The activation store, by directory or URL; several of one model and different text, in any
    order, are one corpus."""
    out: Path
    """Directory of the SAE; also holds the run's log, checkpoints and figures."""
    site: str | None = None
    """Site to train on; None for the store's only one."""
    layers: tuple[int, ...] | None = None
    """Layers to train on, 0-based block indices; None for all that the store holds."""
    expansion_factor: int | None = None
    """Latents a channel; None for 64, unless `num_latents` is given."""
    num_latents: int | None = None
    """Latents, instead of an expansion factor."""
    batch_size: int = 16384
    """Rows of a step, over all layers and ranks."""
    micro_batch: int | None = None
    """Rows of a rank's share of a batch whose activations are in memory at once; None for all. It
    changes how sums are rounded, and nothing else."""
    epochs: int | None = None
    """Passes over the training rows; None for 1, unless `max_rows` is given."""
    max_rows: int | None = None
    """Rows to train on, a row of each layer counting for itself; ends at a whole batch."""
    lr: float | None = None
    """Peak learning rate; None for 2e-4 / √(num_latents / 2¹⁴) (Gao et al., 2024, figure 3)."""
    schedule: str = "linear"
    """How the learning rate falls: `linear`, `cosine`, or `constant` for not at all."""
    lr_decay: float | None = None
    """Last share of the steps, over which the learning rate falls to 0; None for 0.2 where it is
    linear, and for all after the warm-up where it is a cosine."""
    warmup: float = 0.01
    """First share of the steps, over which the learning rate rises."""
    clip_grad_norm: float | None = None
    """Largest L2 norm of a step's gradient; None for any."""
    validation_fraction: float = 0.01
    """Share of the sequences held out, 0 ≤ fraction < 1."""
    skip_positions: int = 1
    """First positions of a sequence that are neither trained on nor counted, 0 to 16."""
    loss_space: str = "standardized"
    """Where the reconstruction error is measured: `standardized` rows, or `raw` ones."""
    window: int | None = None
    """Bytes of rows in memory, over all ranks, by way of the slice; None for slices of 64 KiB."""
    seed: int = 0
    """Of the initial weights."""
    data_seed: int | None = None
    """Of the order of the rows and the validation split; None for `seed`."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto` for CUDA where there is any."""
    precision: str = "float32"
    """Of the encoder product while training: `float32` is exact; with `bfloat16`, candidates are
    re-scored in float32. Evaluation is always exact."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint."""
    checkpoint_seconds: float = 300.0
    """Least time between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept: the last ones."""
    distribute: str = "rows"
    """What several ranks share: the `rows` of each batch, or the `saes` of a sweep."""
    track: str | None = None
    """Where the log goes besides: `tensorboard` or `wandb`; None for nowhere."""
    cache_dir: Path | None = None
    """Where parts of remote stores are kept; None for the user's cache."""
    cache_size: int | None = None
    """Most bytes kept there; None for 10 GiB."""

    def __post_init__(self) -> None:
        for first, second in (("expansion_factor", "num_latents"), ("epochs", "max_rows")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise InputError(f"give {_flag(first)} or {_flag(second)}, not both")
        counts = ("expansion_factor", "num_latents", "k", "epochs", "max_rows")
        for name in (*counts, "batch_size", "micro_batch", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{_flag(name)} must be at least 1, got {value}")
        for name in ("lr", "clip_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{_flag(name)} must be above 0, got {value}")
        for name in ("lr_decay", "warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{_flag(name)} is a share of the steps from 0 to 1, got {value}")
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
                known = " or ".join(filter(None, choices))
                raise InputError(f"{_flag(name)} must be {known}, got {getattr(self, name)!r}")

        self.check_wanted()

    def latents(self, d_in: int) -> int:
        """Number of latents for rows of `d_in` channels."""
        if self.num_latents is not None:
            return self.num_latents
        return d_in * (self.expansion_factor or DEFAULT_EXPANSION_FACTOR)

    @property
    def decay(self) -> float:
        """Last share of the steps, over which the learning rate falls."""
        if self.lr_decay is not None:
            return self.lr_decay
        return {"constant": 0.0, "linear": 0.2, "cosine": 1 - self.warmup}[self.schedule]

    @property
    def order_seed(self) -> int:
        """Seed of the order of the rows and the validation split."""
        return self.seed if self.data_seed is None else self.data_seed

    def peak_lr(self, num_latents: int) -> float:
        """Learning rate of the plateau."""
        return self.lr if self.lr is not None else _PEAK_LR / math.sqrt(num_latents / _LR_LATENTS)


def _flag(name: str) -> str:
    return "-k" if name == "k" else "--" + name.replace("_", "-")
