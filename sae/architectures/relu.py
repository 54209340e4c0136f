"""ReLU with an L1 penalty: a row uses every latent with a pre-activation above 0.

z = ReLU(W_enc (u − b) + b_enc), penalty Σ_j z_j ‖W_dec,j‖, with decoder rows of any length. Source:
Conerly et al. (2024), "Update on how we train SAEs", Transformer Circuits Thread, April 2024.

Shape suffixes: B rows, D channels, N latents, K latents a row, L layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from mlsae.base.errors import InputError
from mlsae.base.settings import setting, settings
from mlsae.base.units import check_not_negative, parse_count, parse_numbers
from mlsae.sae.architectures.base import (
    Activation,
    Architecture,
    Conversion,
    ExtraLoss,
    TrainingRows,
    Weights,
)
from mlsae.sae.kernels.above import above, block_rows
from mlsae.sae.kernels.functions import bag
from mlsae.sae.kernels.sparse import Support


@settings
class ReLUSettings:
    """Training settings for the architectures `relu` and `gated`."""

    l1: float | None = setting(
        default=None,
        unset="none",
        gives_way_to=("architecture",),
        decides=True,
        group="Architecture",
        swept=True,
        doc="Weight λ of the penalty Σ_j z_j ‖W_dec,j‖ in the loss of relu, or of gated with its "
        "gates for z; both need one.",
    )
    l1_warmup: float = setting(
        default=0.05,
        decides=True,
        group="Architecture",
        swept=True,
        doc="First share of steps, over which --l1 rises from 0.",
    )
    layer_l1: tuple[float, ...] | None = setting(
        default=None,
        unset="1 each",
        by_layer=True,
        gives_way_to=("architecture",),
        decides=True,
        group="Architecture",
        parse=parse_numbers,
        doc="Multiplier for --l1 at each layer, as 1,1,2.",
    )
    resample_every: int | None = setting(
        default=None,
        unset="an eighth of all",
        gives_way_to=("architecture",),
        decides=True,
        group="Architecture",
        swept=True,
        parse=parse_count,
        doc="Steps between resamplings of dead latents with relu or gated, in the first half of "
        "the run; 0 for never.",
    )


@dataclass(frozen=True, kw_only=True)
class L1(ExtraLoss):
    """Each row's penalty: λ_l Σ_j z_j ‖W_dec,j‖."""

    weight: float
    """λ."""
    by_layer: torch.Tensor | None = None
    """(L,) multipliers for λ; None for 1."""
    rise: int = 0
    """First steps, over which λ rises from 0."""

    def __call__(self, active: Activation, rows: TrainingRows, weights: Weights) -> torch.Tensor:
        """(B,) penalties, with gradients for values and decoder."""
        lengths_N1 = torch.linalg.vector_norm(weights["W_dec"], dim=1, keepdim=True)
        cost_B = bag(active.values, lengths_N1, active.support)[:, 0]
        cost_B = cost_B * (self.weight * (min(1.0, rows.step / self.rise) if self.rise else 1.0))
        return cost_B if self.by_layer is None else cost_B * self.by_layer[rows.layer]


@dataclass(frozen=True)
class ReLU(Architecture):
    """The architecture `relu`."""

    name = "relu"
    summary = "all above 0, with an L1 penalty in training"
    settings = ReLUSettings
    encoder_bias = True
    unit_decoder = False
    revival = "resample"
    conversions: ClassVar[Mapping[str, Conversion]] = {
        "saelens": Conversion(name="standard"),
        "dictionary-learning": Conversion(
            name="AutoEncoder", constants={"trainer_class": "StandardTrainer"}
        ),
        "llamascopium": Conversion(name="relu"),
    }

    @classmethod
    def wanted(cls, settings: ReLUSettings) -> "ReLU":  # noqa: ARG003
        """The architecture, which has no settings of its own in an SAE."""
        return cls()

    @classmethod
    def check_values(cls, settings: ReLUSettings) -> None:
        """Refuse negative numbers, and a warm-up that is no share."""
        check_not_negative("--layer-l1", settings.layer_l1)
        if settings.l1 is not None and not 0 <= settings.l1 < math.inf:
            raise InputError(f"--l1 must be at least 0, got {settings.l1}")
        if not 0 <= settings.l1_warmup <= 1:
            raise InputError(
                f"--l1-warmup is a share of the steps from 0 to 1, got {settings.l1_warmup}"
            )
        if settings.resample_every is not None and settings.resample_every < 0:
            raise InputError(f"--resample-every must be at least 0, got {settings.resample_every}")

    @classmethod
    def check_chosen(cls, settings: ReLUSettings) -> None:
        """Refuse to train without a penalty."""
        if settings.l1 is None:
            raise InputError(
                f"--architecture {cls.name} needs --l1, the weight of its penalty, as in 0.01"
            )

    @property
    def most_active(self) -> None:
        """None: a row may use any number of latents."""
        return None

    def most_rows(self, num_latents: int, element_size: int) -> int:
        """Rows that make one block of rows × latents."""
        return block_rows(num_latents, element_size)

    def activate(
        self,
        u_BD: torch.Tensor,
        weights: Weights,
        at: torch.Tensor | int | None,  # noqa: ARG002
    ) -> tuple[torch.Tensor, Support]:
        """All latents above 0."""
        return above(u_BD, weights["W_enc"], weights["b"], weights.get("b_enc"))

    def extra_loss(
        self, settings: ReLUSettings, num_steps: int, like: torch.Tensor
    ) -> ExtraLoss | None:
        """The L1 penalty, its λ rising over the first steps; None without a λ."""
        return l1_penalty(settings, num_steps, like)


def l1_penalty(settings: ReLUSettings, num_steps: int, like: torch.Tensor) -> L1 | None:
    """The penalty of the settings; arguments as for `Architecture.extra_loss`."""
    if settings.l1 is None:
        return None
    by_layer = settings.layer_l1
    return L1(
        weight=settings.l1,
        by_layer=None if by_layer is None else like.new_tensor(by_layer),
        rise=round(settings.l1_warmup * num_steps),
    )
