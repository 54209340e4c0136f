"""Gated: one encoder decides which latents a row uses, and, with another scale, how much of them.

π = W_enc (u − b) + b_gate and μ = e^r ⊙ W_enc (u − b) + b_mag; z = H(π) ⊙ ReLU(μ), with H the step
function, through which no gradient goes. It reaches the gates by two terms of the loss,
λ Σ_j ReLU(π_j) ‖W_dec,j‖ and the error of û' = W_dec ReLU(π) + b, in which W_dec and b are held
fixed. r, b_gate and b_mag begin with 0. Source: Rajamanoharan et al. (2024), arXiv 2404.16014.

z is that of a JumpReLU SAE with W_enc' = e^r ⊙ W_enc, b_enc' = b_mag and
θ = max(b_mag − e^r ⊙ b_gate, 0), which is what is kept (appendix H there has its inverse).

Shape suffixes: B rows, D channels, N latents, K latents a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from mlsae.sae.architectures.base import (
    Activation,
    Conversion,
    ExtraLoss,
    Kept,
    Parameter,
    Shape,
    TrainingRows,
    Weights,
)
from mlsae.sae.architectures.jumprelu import JumpReLU
from mlsae.sae.architectures.relu import L1, ReLU, ReLUSettings, l1_penalty
from mlsae.sae.kernels.above import above
from mlsae.sae.kernels.functions import bag, sampled_product
from mlsae.sae.kernels.sparse import Support

_GATES = ("r_mag", "b_gate", "b_mag")


@dataclass(frozen=True, kw_only=True)
class GatedLoss(ExtraLoss):
    """Each row's penalty on open gates, and the error of a reconstruction from the gates alone."""

    penalty: L1 | None
    """Penalty, on ReLU(π) instead of z; None without a λ."""

    def __call__(self, active: Activation, rows: TrainingRows, weights: Weights) -> torch.Tensor:
        """(B,) terms, with gradients for gates, and of the penalty for the decoder."""
        gate_BK, support = active.gate, active.support
        assert gate_BK is not None
        u_hat_BD = bag(gate_BK, weights["W_dec"].detach(), support) + weights["b"].detach()
        error_B = (rows.u - u_hat_BD).square().sum(dim=1) * rows.weight
        if self.penalty is None:
            return error_B
        return error_B + self.penalty(Activation(gate_BK, support), rows, weights)


@dataclass(frozen=True)
class Gated(ReLU):
    """The architecture `gated` in training; an SAE directory has `jumprelu`."""

    name = "gated"
    summary = "those with open gates, with an L1 penalty on gates in training"
    settings = ReLUSettings
    encoder_bias = False
    conversions: ClassVar[Mapping[str, Conversion]] = {}

    @classmethod
    def wanted(cls, settings: ReLUSettings) -> "Gated":  # noqa: ARG003
        """The architecture, which has no settings of its own in an SAE."""
        return cls()

    def parameters(self, shape: Shape) -> tuple[Parameter, ...]:
        """Parameters, and r, b_gate and b_mag: (N,) each."""
        of_latents = (shape.num_latents,)
        gates = (Parameter(name=name, shape=of_latents) for name in _GATES)
        return (*super().parameters(shape), *gates)

    def activate(
        self,
        u_BD: torch.Tensor,
        weights: Weights,
        at: torch.Tensor | int | None,  # noqa: ARG002
    ) -> tuple[torch.Tensor, Support]:
        """The latents with π > 0; their values may be 0."""
        values_BK, _, support = _values(u_BD, weights)
        return values_BK, support

    def activate_in_training(
        self,
        rows: TrainingRows,
        weights: Weights,
        *,
        mixed: bool,  # noqa: ARG002
    ) -> Activation:
        """As everywhere; `gate` is ReLU(π)."""
        values_BK, gate_BK, support = _values(rows.u, weights)
        return Activation(values_BK, support, gate_BK)

    def extra_loss(self, settings: ReLUSettings, num_steps: int, like: torch.Tensor) -> GatedLoss:
        """The penalty on gates, and their own reconstruction error."""
        return GatedLoss(penalty=l1_penalty(settings, num_steps, like))

    def kept(self, weights: Weights) -> Kept:
        """The JumpReLU SAE with these latents; the record has r and b_gate, (N,) each."""
        W_enc, r_mag, b_gate, b_mag = (weights[name] for name in ("W_enc", *_GATES))
        factor = r_mag.exp()
        found = {
            "W_enc": factor[:, None] * W_enc,
            "W_dec": weights["W_dec"],
            "b": weights["b"],
            "b_enc": b_mag,
            "threshold": (b_mag - factor * b_gate).clamp(min=0),
        }
        return Kept(JumpReLU(), found, {"gates": {"r_mag": r_mag, "b_gate": b_gate}})


def _values(u_BD: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor, Support]:
    """z and ReLU(π), (B, K), with gradients, and their places."""
    W_enc, b, r_mag, b_gate, b_mag = (weights[name] for name in ("W_enc", "b", *_GATES))
    gate_BK, support = above(u_BD, W_enc, b, b_gate)
    # μ = e^r (π − b_gate) + b_mag.
    factor_N = r_mag.exp()
    ones_B1 = u_BD.new_ones(len(u_BD), 1)
    factor_BK, shift_BK = (
        sampled_product(ones_B1, of_latents[:, None], support)
        for of_latents in (factor_N, b_mag - factor_N * b_gate)
    )
    mu_BK = factor_BK * gate_BK + shift_BK
    return mu_BK.relu().where(gate_BK > 0, 0), gate_BK, support
