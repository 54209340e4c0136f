"""What a training run is asked to minimise, and of which kind the SAE shall be."""

import math
from dataclasses import dataclass

from mlsae.base.errors import InputError
from mlsae.sae.config import ARCHITECTURES, LAYER_SCALES, NORMALIZE

_OF_PAPER: dict[str, tuple[object, ...]] = {
    "architecture": ("topk",),
    "normalize": ("standardize", "none"),
    "layer_scale": ("none",),
    "layer_weights": (None,),
}
"""What the preset can be combined with."""


@dataclass(frozen=True, kw_only=True)
class WantedSAE:
    """Architecture, penalty and normalisation.

    Raises:
        InputError: a value is out of range, or two exclude each other.
    """

    preset: str | None = None
    """`paper` for the step of the published multi-layer SAEs (train/published/step.py)."""
    architecture: str = "topk"
    """`topk`, or `relu` with an L1 penalty."""
    l1: float | None = None
    """λ, the weight of Σ_j z_j ‖W_dec,j‖ in the loss of relu; needed there."""
    l1_warmup: float = 0.05
    """First share of the steps, over which λ rises from 0."""
    resample_every: int | None = None
    """Steps after which dead latents of relu are drawn anew, in the first half of the run; 0 for
    never, None for an eighth of the steps."""
    normalize: str = "standardize"
    """How rows are normalised: `standardize`, `none`, `scale` or `center` (sae/normalize.py)."""
    layer_scale: str = "none"
    """Scale of each layer from the mean norms of all: `none`, `log`, `sqrt` or `linear`."""
    layer_weights: tuple[float, ...] | None = None
    """Weight of each layer's reconstruction error in the loss; None for 1."""
    layer_l1: tuple[float, ...] | None = None
    """What λ is multiplied by at each layer; None for 1."""

    def check_wanted(self) -> None:
        """Refuse values that are out of range.

        Raises:
            InputError: as of the class.
        """
        for name, choices in (
            ("architecture", ARCHITECTURES),
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
        if self.l1 is not None and not 0 <= self.l1 < math.inf:
            raise InputError(f"--l1 must be at least 0, got {self.l1}")
        if not 0 <= self.l1_warmup <= 1:
            raise InputError(
                f"--l1-warmup is a share of the steps from 0 to 1, got {self.l1_warmup}"
            )
        if self.resample_every is not None and self.resample_every < 0:
            raise InputError(f"--resample-every must be at least 0, got {self.resample_every}")
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
        if self.architecture == "relu" and self.l1 is None:
            raise InputError(
                "--architecture relu needs --l1, the weight of its penalty, as in 0.01"
            )
        if self.architecture != "relu":
            for name in ("l1", "layer_l1", "resample_every"):
                if getattr(self, name) is not None:
                    flag = "--" + name.replace("_", "-")
                    raise InputError(f"{flag} is of --architecture relu, got {self.architecture}")
        if self.architecture == "relu" and precision != "float32":
            raise InputError(
                f"--precision {precision} selects candidates of topk: relu takes float32"
            )
        if self.layer_scale != "none" and self.normalize != "none":
            raise InputError(
                f"--layer-scale {self.layer_scale} takes rows as they are: it needs --normalize "
                f"none, got {self.normalize}"
            )
