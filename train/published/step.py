"""The step of the published multi-layer SAEs, with its differences from the one here.

For comparison with Lawson et al. (2024), arXiv 2409.04185, as https://github.com/tim-lawson/mlsae
computes it. A micro-batch is the rows of all layers of some tokens in the order of the text, rows
of special tokens set to 0. Its loss is

    mean_l [mean (x − x̂)² / var(x)] + (1/32) · mean (e − ê)² / mean (e − mean_d e)²

with var the unbiased variance of all numbers of the layer about one mean, e = x − x̂ in the rows'
own units and not detached, and ê = W_dec z_aux + b, which is not brought back to those units;
without a dead latent ê is b. A latent is dead that has passed 1e-3 in none of the last 76
micro-batches, this one included. After each micro-batch decoder rows are made unit, and then the
gradient that has gathered loses its part along them; Adam follows the last micro-batch of a step,
at one learning rate, and does not make them unit again. b begins as the geometric median of the
first micro-batch before it is standardised.

Not as published: arithmetic is in float32 throughout, and one process sees each row once.

Shape suffixes: L layers, T tokens, D channels, N latents, R all rows, K latents of a row.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from mlsae.sae import SAE
from mlsae.sae.kernels.functions import bag, preactivations
from mlsae.sae.kernels.select import select
from mlsae.sae.kernels.sparse import Support
from mlsae.sae.normalize import restore
from mlsae.train.step.optimizer import ADAM_BETAS, ADAM_EPS, remove_along
from mlsae.train.step.trainer import DivergedError

LR = 1e-4
MOST_LR = torch.finfo(torch.float32).max * (1 - ADAM_BETAS[0])
"""Adam's first step is 1 / (1 − β₁) times the rate, a float32."""
K_AUX = 256
DEAD_AFTER = 76
"""Micro-batches; of 2,048 tokens as published, so 155,648 tokens."""
THRESHOLD = 1e-3
_COEFFICIENT = 1 / 32


class PaperResult(NamedTuple):
    """Measurements of a step: means over its micro-batches."""

    loss: float
    """Both terms."""
    fvu_by_layer: torch.Tensor
    """(L,) mean (x − x̂)² / var(x)."""
    l0: float
    """Values above 0 of a row."""


class PaperTrainer:
    """The SAE and its step.

    Args:
        sae: a topk SAE that standardises or does not normalise, without an encoder bias.
        lr: learning rate.
        k_aux: dead latents that may explain a row.
        dead_after: micro-batches without use after which a latent is dead.
    """

    def __init__(
        self, sae: SAE, lr: float = LR, k_aux: int = K_AUX, dead_after: int = DEAD_AFTER
    ) -> None:
        self.sae = sae
        self._k_aux, self._dead_after = k_aux, dead_after
        self._unused_N = torch.zeros(sae.config.num_latents, dtype=torch.int64, device=sae.b.device)
        self._adam = torch.optim.Adam(sae.parameters(), lr=lr, betas=ADAM_BETAS, eps=ADAM_EPS)
        self.step_number = 0
        """Steps done."""

    @property
    def num_dead(self) -> int:
        """Latents that are dead now."""
        return int((self._unused_N >= self._dead_after).sum())

    def step(self, micro_batches: Iterable[torch.Tensor], count: int) -> PaperResult:
        """Train on `count` micro-batches (L, T, D), of which one is looked at at a time.

        Raises:
            DivergedError: the loss is not finite; Adam has not taken the step.
        """
        self._adam.zero_grad()
        seen: list[PaperResult] = []
        for x_LTD in micro_batches:
            if self.step_number == 0 and not seen:
                with torch.no_grad():
                    self.sae.b.copy_(geometric_median(x_LTD.to(self.sae.b).flatten(0, 1)))
            result, loss = self._loss(x_LTD.to(self.sae.b))
            if not loss.isfinite():
                lr = self._adam.param_groups[0]["lr"]
                bad = torch.nonzero(~result.fvu_by_layer.isfinite())[:, 0].tolist()
                raise DivergedError(result.loss, self.step_number, lr, bad)
            torch.autograd.backward(loss / count)
            self._project()
            seen.append(result)
        self._adam.step()
        self.step_number += 1
        return PaperResult(
            loss=sum(result.loss for result in seen) / count,
            fvu_by_layer=torch.stack([result.fvu_by_layer for result in seen]).mean(0),
            l0=sum(result.l0 for result in seen) / count,
        )

    @torch.no_grad()
    def _project(self) -> None:
        W, grad = self.sae.W_dec, self.sae.W_dec.grad
        assert grad is not None
        self.sae.normalize_decoder()
        remove_along(W, grad)

    def _loss(self, x_LTD: torch.Tensor) -> tuple[PaperResult, torch.Tensor]:
        sae = self.sae
        x_RD = x_LTD.flatten(0, 1)
        u_RD, mean_R1, scale_R1 = sae.standardize(x_RD)
        values_RK, support = sae.activate(u_RD)
        x_hat_RD = restore(sae.reconstruct(values_RK, support), mean_R1, scale_R1)
        e_RD = x_RD - x_hat_RD
        self._unused_N[support.indices_BK[values_RK > THRESHOLD]] = 0
        self._unused_N += 1
        dead = torch.nonzero(self._unused_N >= self._dead_after)[:, 0]
        errors_L = e_RD.view_as(x_LTD).square().mean(dim=(1, 2))
        fvu_L = errors_L / x_LTD.var(dim=(1, 2))
        centred_RD = e_RD - e_RD.mean(dim=1, keepdim=True)
        left = (e_RD - self._explained(u_RD, dead)).square().mean()
        auxiliary = (left / centred_RD.square().mean()).nan_to_num(0)
        loss = fvu_L.mean() + _COEFFICIENT * auxiliary
        l0 = (values_RK > 0).sum().item() / len(x_RD)
        return PaperResult(loss.item(), fvu_L.detach(), l0), loss

    def _explained(self, u_RD: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        """ê: (R, D) by dead latents and b; (D,) b alone without a dead latent."""
        sae = self.sae
        if not len(dead):
            return sae.b
        W_enc, W_dec = sae.W_enc[dead], sae.W_dec[dead]
        with torch.no_grad():
            k = min(self._k_aux, len(dead))
            pre_RK, indices_RK = select(u_RD - sae.b, W_enc.contiguous(), k)
        support = Support(indices_RK, len(dead))
        values_RK = preactivations(u_RD, W_enc, sae.b, pre_RK, support).relu()
        return bag(values_RK, W_dec, support) + sae.b


def geometric_median(
    points_RD: torch.Tensor, max_iterations: int = 100, tolerance: float = 1e-5
) -> torch.Tensor:
    """(D,) the point with the least sum of distances to all, by Weiszfeld's iteration.

    Source: Weiszfeld (1937), with the published number of iterations and tolerance. Points that lie
    where the estimate is are left out of the next one, where the published code divides by 0.
    """
    median_D = points_RD.mean(dim=0)
    for _ in range(max_iterations):
        before_D = median_D
        distances_R = torch.linalg.vector_norm(points_RD - median_D, dim=1)
        weights_R = torch.where(distances_R > 0, 1 / distances_R, 0)
        if not weights_R.any():
            break
        median_D = (weights_R[:, None] / weights_R.sum() * points_RD).sum(dim=0)
        if torch.linalg.vector_norm(median_D - before_D) < tolerance:
            break
    return median_D
