"""JumpReLU: a row uses the latents whose pre-activations are above thresholds of their own.

z_j = h_j H(h_j − θ_j), with h = W_enc (u − b) + b_enc, H the step function and θ_j ≥ 0.

Training follows the gradient of an expected loss in which H has the slope 1/ε within ε/2 of θ_j, on
both of its sides: ∂z_j/∂θ_j = −(θ_j/ε) K and ∂H/∂θ_j = −(1/ε) K, with K = 1 where
|h_j − θ_j| < ε/2, else 0. Source: Rajamanoharan et al. (2024), arXiv 2407.14435. With gradients for
h besides, of opposite sign: Anthropic (2025), "Dictionary learning optimization techniques",
Transformer Circuits Thread, January 2025.

L0 is held by a penalty, which reaches θ alone unless h has such gradients:

- λ L0 of each row, with λ = `--l0-penalty`;
- ((L0 − a) / L0*)² of each row, with L0* = `--target-l0`. With a = L0* it is the quadratic penalty
  of Gemma Scope 2. The mean L0 would then be off its target: below it, since rows with many latents
  count most, or above it, since more latents reconstruct better. So the aim a, L0* at first, moves
  after each step by 8/(number of steps) times L0* minus the step's mean L0, of which 5% of L0*
  count at most: where L0 is far off, the penalty itself leads back. No gradient goes through a,
  which depends on counts alone.

θ and ε are in units of rows with E‖u‖² = d, and are scaled to the rows that there are.

Shape suffixes: B rows, D channels, N latents, E entries of all rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, ClassVar, TypeVar

import torch

from mlsae.base.errors import InputError
from mlsae.base.settings import setting, settings
from mlsae.base.units import counted
from mlsae.sae.architectures.base import (
    Activation,
    Architecture,
    Conversion,
    ExtraLoss,
    Parameter,
    Shape,
    TrainingRows,
    Weights,
)
from mlsae.sae.kernels.above import above, entries_above
from mlsae.sae.kernels.functions import bag, preactivations, sampled_product
from mlsae.sae.kernels.sparse import Entries, Support

TARGET_L0 = 32
"""Target where neither a target nor a penalty is chosen."""
BANDWIDTH = 0.5
"""ε where none is chosen, for rows with E‖u‖² = d."""
WARMUP = 0.05
"""Share of steps over which the penalty rises, where none is chosen."""
_SPREAD = 3**-0.5
"""Deviation of h before training."""
_GAIN, _MOST_OFF = 8, 0.05
_THRESHOLD, _BOTH = "threshold", "both"

Settings = TypeVar("Settings", bound="JumpReLUSettings")


@settings
class JumpReLUSettings:
    """Training settings for the architecture `jumprelu`."""

    target_l0: float | None = setting(
        default=None,
        unset="32, without --l0-penalty",
        gives_way_to=("architecture", "l0_penalty"),
        decides=True,
        group="Architecture",
        swept=True,
        doc="Mean number of latents that a row of jumprelu is to use.",
    )
    l0_penalty: float | None = setting(
        default=None,
        unset="none",
        gives_way_to=("architecture", "target_l0"),
        decides=True,
        group="Architecture",
        swept=True,
        doc="Weight λ in the loss of jumprelu for each latent that a row uses, instead of "
        "--target-l0.",
    )
    l0_warmup: float | None = setting(
        default=None,
        unset=f"{WARMUP:g}",
        gives_way_to=("architecture",),
        decides=True,
        group="Architecture",
        swept=True,
        doc="First share of steps, over which jumprelu's penalty rises from 0.",
    )
    initial_threshold: float | None = setting(
        default=None,
        unset="for the target at random directions",
        gives_way_to=("architecture",),
        decides=True,
        group="Architecture",
        swept=True,
        doc="Thresholds of jumprelu before training, for rows of mean square length d_in.",
    )
    bandwidth: float | None = setting(
        default=None,
        unset=f"{BANDWIDTH:g}",
        gives_way_to=("architecture",),
        decides=True,
        group="Architecture",
        swept=True,
        doc="Width ε about jumprelu's thresholds within which pre-activations move them, for rows "
        "of mean square length d_in.",
    )
    straight_through: str | None = setting(
        default=None,
        unset=_THRESHOLD,
        gives_way_to=("architecture",),
        decides=True,
        group="Architecture",
        swept=True,
        doc="Receivers of jumprelu's straight-through gradients: threshold, or both for the "
        "pre-activations, too.",
    )


@dataclass(kw_only=True)
class L0Penalty(ExtraLoss):
    """Each row's penalty: λ L0, or ((L0 − a) / L0*)² with the aim a."""

    num_steps: int
    """Steps in the run."""
    rise: int
    """First steps, over which the penalty rises from 0."""
    weight: float | None = None
    """λ; None with a target."""
    target: float = TARGET_L0
    """L0*."""
    aim: float = TARGET_L0
    """a."""

    def __call__(self, active: Activation, rows: TrainingRows, weights: Weights) -> torch.Tensor:
        """(B,) penalties, with gradients for what `JumpReLU.activate_in_training` gives some."""
        assert active.gate is not None
        ones_N1 = torch.ones_like(weights["b_enc"])[:, None]
        l0_B = bag(active.gate, ones_N1, active.support)[:, 0]
        share = min(1.0, rows.step / self.rise) if self.rise else 1.0
        if self.weight is not None:
            return l0_B * (self.weight * share)
        return ((l0_B - self.aim) / self.target).square() * share

    def after_step(self, l0: float) -> None:
        """Move the aim against the difference between the step's mean L0 and the target."""
        most = _MOST_OFF * self.target
        self.aim += _GAIN / self.num_steps * max(-most, min(most, self.target - l0))

    def state(self) -> dict[str, float]:
        """The aim."""
        return {"aim": self.aim}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on with the aim of a checkpoint."""
        self.aim = state["aim"]


@dataclass(frozen=True)
class JumpReLU(Architecture):
    """The architecture `jumprelu`."""

    name = "jumprelu"
    summary = "all above a threshold of their own, with an L0 penalty in training"
    settings = JumpReLUSettings
    encoder_bias = True
    revival = "preactivation"
    conversions: ClassVar[Mapping[str, Conversion]] = {
        "saelens": Conversion(name="jumprelu"),
        "dictionary-learning": Conversion(
            name="JumpReluAutoEncoder", constants={"trainer_class": "JumpReluTrainer"}
        ),
        "gemma-scope": Conversion(name="jumprelu"),
        "llamascopium": Conversion(name="jumprelu"),
    }

    @classmethod
    def wanted(cls, settings: JumpReLUSettings) -> "JumpReLU":  # noqa: ARG003
        """The architecture, which has no settings of its own in an SAE."""
        return cls()

    @classmethod
    def check_values(cls, settings: JumpReLUSettings) -> None:
        """Refuse numbers out of range, and a target beside a weight."""
        for flag, value in (
            ("--target-l0", settings.target_l0),
            ("--bandwidth", settings.bandwidth),
        ):
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{flag} must be above 0, got {value:g}")
        for flag, value in (
            ("--l0-penalty", settings.l0_penalty),
            ("--initial-threshold", settings.initial_threshold),
        ):
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{flag} must be at least 0, got {value:g}")
        warmup = settings.l0_warmup
        if warmup is not None and not 0 <= warmup <= 1:
            raise InputError(f"--l0-warmup is a share of the steps from 0 to 1, got {warmup:g}")
        if settings.straight_through not in (None, _THRESHOLD, _BOTH):
            raise InputError(
                f"--straight-through must be {_THRESHOLD} or {_BOTH}, got "
                f"{settings.straight_through!r}"
            )
        if settings.target_l0 is not None and settings.l0_penalty is not None:
            raise InputError("give --target-l0 or --l0-penalty, not both")

    def check_trained(self, settings: JumpReLUSettings, shape: Shape) -> None:
        """Refuse a target of all latents or more."""
        target = TARGET_L0 if settings.target_l0 is None else settings.target_l0
        if settings.l0_penalty is None and target >= shape.num_latents:
            raise InputError(
                f"--target-l0 must be below the number of latents: got {target:g} and "
                f"{counted(shape.num_latents, 'latent')}; lower it or raise --num-latents or "
                f"--expansion-factor"
            )

    def parameters(self, shape: Shape) -> tuple[Parameter, ...]:
        """Parameters, and θ: `threshold` (N,), at least 0, in float32."""
        theta = Parameter(name="threshold", shape=(shape.num_latents,), least=0.0, float32=True)
        return (*super().parameters(shape), theta)

    def resolved(self, settings: Settings, shape: Shape, unit: float) -> Settings:
        """Settings with defaults filled in, θ₀ and ε in units of the rows that there are.

        Without a choice θ₀ is the quantile of h above which there are as many latents as the
        target, were h normal: random directions have a mean square length of 1/3.
        """
        found: dict[str, Any] = {}
        target = TARGET_L0 if settings.target_l0 is None else settings.target_l0
        if settings.l0_penalty is None:
            found["target_l0"] = target
        if settings.l0_warmup is None:
            found["l0_warmup"] = WARMUP
        start = settings.initial_threshold
        if start is None:
            below = 1 - min(0.5, target / shape.num_latents)
            start = NormalDist(sigma=_SPREAD).inv_cdf(below)
        bandwidth = BANDWIDTH if settings.bandwidth is None else settings.bandwidth
        return replace(
            settings, **found, initial_threshold=start * unit, bandwidth=bandwidth * unit
        )

    def prepare(self, weights: Weights, settings: JumpReLUSettings) -> None:
        """Set every θ to θ₀."""
        assert settings.initial_threshold is not None
        weights["threshold"].fill_(settings.initial_threshold)

    @property
    def most_active(self) -> None:
        """None: a row may use any number of latents."""
        return None

    def expected_in_training(self, settings: JumpReLUSettings, shape: Shape) -> int:
        """Twice those within reach of θ₀ at random directions, or twice the target."""
        found = self.resolved(settings, shape, 1.0)
        assert found.initial_threshold is not None
        assert found.bandwidth is not None
        least = found.initial_threshold - found.bandwidth / 2
        reached = shape.num_latents * (1 - NormalDist(sigma=_SPREAD).cdf(least))
        return min(shape.num_latents, math.ceil(2 * max(reached, found.target_l0 or 0)))

    def activate(
        self,
        u_BD: torch.Tensor,
        weights: Weights,
        at: torch.Tensor | int | None,  # noqa: ARG002
    ) -> tuple[torch.Tensor, Support]:
        """The latents above θ."""
        return above(
            u_BD, weights["W_enc"], weights["b"], weights.get("b_enc"), weights["threshold"]
        )

    def activate_in_training(
        self,
        rows: TrainingRows,
        weights: Weights,
        *,
        mixed: bool,  # noqa: ARG002
    ) -> Activation:
        """The latents above θ − ε/2, (E,) row after row, those up to θ with the value 0.

        `gate` is H(h − θ). It and the values have the gradients of the module's docstring.
        """
        bandwidth = rows.settings.bandwidth
        W_enc, b, b_enc, theta = (weights[name] for name in ("W_enc", "b", "b_enc", "threshold"))
        with torch.no_grad():
            found = entries_above(rows.u - b, W_enc, b_enc, theta - bandwidth / 2)
        support = Entries.of_rows(found.rows, found.latents, len(rows.u), len(W_enc))
        h_E = preactivations(rows.u, W_enc, b, found.values, support, b_enc)
        theta_E = sampled_product(rows.u.new_ones(len(rows.u), 1), theta[:, None], support)
        moved_E = theta_E - h_E if rows.settings.straight_through == _BOTH else theta_E
        with torch.no_grad():
            is_open = h_E > theta_E
            slope_E = ((h_E - theta_E).abs() < bandwidth / 2) / bandwidth
        # 0, with a gradient.
        shift_E = slope_E.detach() * (moved_E - moved_E.detach())
        values_E = h_E.where(is_open, 0) - theta_E.detach() * shift_E
        return Activation(values_E, support, is_open.to(h_E.dtype) - shift_E)

    def extra_loss(
        self,
        settings: JumpReLUSettings,
        num_steps: int,
        like: torch.Tensor,  # noqa: ARG002
    ) -> L0Penalty:
        """The penalty that holds L0."""
        assert settings.l0_warmup is not None
        rise = round(settings.l0_warmup * num_steps)
        if settings.l0_penalty is not None:
            return L0Penalty(num_steps=num_steps, rise=rise, weight=settings.l0_penalty)
        target = settings.target_l0
        assert target is not None
        return L0Penalty(num_steps=num_steps, rise=rise, target=target, aim=target)
