"""What training minimises: reconstruction in units of each layer's variance, and AuxK.

(1/B) Σ_rows ‖u − û‖² / V_l + aux, with V_l = Σ_d Var(u_d) over all eligible rows of layer l. Both
terms are sums over rows once B and the totals in them are those of the whole batch, so that shares
of a batch add up to it exactly.

AuxK (Gao et al., 2024, arXiv 2406.04093, appendix A.2) lets dead latents reconstruct what is left:
e = u − û (no gradient), ê = W_dec z without b, z = ReLU of the largest pre-activations among dead
latents alone, aux = (1/32) · min(1, num_dead / k_aux) · Σ‖e − ê‖² / Σ‖e‖².

Shape suffixes: B rows, D channels, N latents, L layers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mlsae.base.errors import InputError
from mlsae.sae import SAE
from mlsae.sae.functions import bag, preactivations
from mlsae.sae.normalize import EPS
from mlsae.sae.select import select
from mlsae.sae.sparse import Support
from mlsae.store import Moments

LOSS_SPACES = ("standardized", "raw")
AUX_COEFFICIENT = 1 / 32

Sum = Callable[[torch.Tensor], torch.Tensor]
"""Adds a tensor up over ranks."""


class Losses(NamedTuple):
    """One rank's share of a batch's loss, and what is counted on the way."""

    main: torch.Tensor
    """() the reconstruction term."""
    aux: torch.Tensor
    """() AuxK, coefficient included; 0 without dead latents."""
    layer_errors: torch.Tensor
    """(L,) Σ ‖u − û‖² / V_l over this rank's rows of each layer."""
    layer_rows: torch.Tensor
    """(L,) this rank's rows of each layer."""
    num_active: torch.Tensor
    """() Σ over rows of values above 0."""
    fired: torch.Tensor
    """(N,) 1 for a latent with a value above 0 on any of this rank's rows, else 0."""


def layer_variances(
    moments: Moments, layers: tuple[int, ...], loss_space: str
) -> npt.NDArray[np.float64]:
    """(L,) V_l = Σ_d Var(u_d), or Σ_d Var(x_d) for raw loss, over the rows of the moments.

    Raises:
        InputError: a layer does not vary.
    """
    at = [moments.layers.index(layer) for layer in layers]
    m2 = moments.m2 if loss_space == "raw" else moments.u_m2
    variances: npt.NDArray[np.float64] = m2[at].sum(axis=1) / moments.count
    for layer, variance in zip(layers, variances.tolist(), strict=True):
        if not variance > 0:
            raise InputError(
                f"the activations of layer {layer} do not vary (variance {variance:g}): there is "
                f"nothing to reconstruct; leave it out with --layers"
            )
    return variances


def default_k_aux(d_in: int) -> int:
    """The power of two nearest d_in / 2, the larger one of two equally near."""
    below: int = 2 ** math.floor(math.log2(d_in / 2))
    return below if d_in / 2 - below < 2 * below - d_in / 2 else 2 * below


class Objective:
    """The loss of a batch.

    Args:
        sae: what is trained.
        variances: (L,) V_l in the loss's space.
        loss_space: `standardized` or `raw`: where the main term is measured.
        mixed: select latents by a bfloat16 product.
    """

    def __init__(
        self,
        sae: SAE,
        variances: npt.NDArray[np.float64],
        loss_space: str,
        *,
        mixed: bool = False,
    ) -> None:
        self._sae = sae
        weights = torch.from_numpy(1 / variances)
        self._weights_L = weights.to(sae.b.device, sae.b.dtype)
        self._raw = loss_space == "raw"
        self._mixed = mixed
        self.k_aux = default_k_aux(sae.config.d_in)

    def __call__(
        self,
        x_BD: torch.Tensor,
        layer_B: torch.Tensor,
        batch_rows: int,
        dead: torch.Tensor,
        sum_over_ranks: Sum,
    ) -> Losses:
        """One rank's share of the loss; `main + aux` is to be minimised.

        Args:
            x_BD: (B, D) this rank's rows, as stored; B may be 0.
            layer_B: (B,) their layers' indices.
            batch_rows: rows of the whole batch.
            dead: indices of the dead latents, the same on every rank.
            sum_over_ranks: called equally often on every rank.
        """
        sae = self._sae
        u_BD, _, scale_B1 = sae.standardize(x_BD)
        values_BK, support = sae.activate(u_BD, mixed=self._mixed)
        e_BD = u_BD - sae.reconstruct(values_BK, support)
        # In raw units x − x̂ = u (s + ε) − û s.
        loss_e_BD = torch.addcmul(EPS * u_BD, e_BD, scale_B1) if self._raw else e_BD
        errors_B = loss_e_BD.square().sum(dim=1) * self._weights_L[layer_B]
        num_layers = len(self._weights_L)
        fired = torch.zeros_like(sae.W_enc[:, 0])
        with torch.no_grad():
            active = values_BK > 0
            fired[support.indices_BK[active]] = 1
            layer_errors = fired.new_zeros(num_layers).index_add_(0, layer_B, errors_B)
        return Losses(
            main=errors_B.sum() / batch_rows,
            aux=self._auxiliary(u_BD, e_BD.detach(), dead, sum_over_ranks),
            layer_errors=layer_errors,
            layer_rows=torch.bincount(layer_B, minlength=num_layers),
            num_active=active.sum(),
            fired=fired,
        )

    def _auxiliary(
        self, u_BD: torch.Tensor, e_BD: torch.Tensor, dead: torch.Tensor, sum_over_ranks: Sum
    ) -> torch.Tensor:
        sae, num_dead = self._sae, len(dead)
        if num_dead == 0:
            return u_BD.new_zeros(())
        total = sum_over_ranks(e_BD.square().sum())
        W_enc, W_dec = sae.W_enc[dead], sae.W_dec[dead]
        with torch.no_grad():
            pre, indices = select(u_BD - sae.b, W_enc, min(self.k_aux, num_dead))
        support = Support(indices, num_dead)
        values = preactivations(u_BD, W_enc, sae.b, pre, support).relu()
        remainder = (e_BD - bag(values, W_dec, support)).square().sum()
        coefficient = AUX_COEFFICIENT * min(1.0, num_dead / self.k_aux)
        # Without a residual there is nothing to explain, and 0 / 0 would poison the gradient.
        return remainder * torch.where(total > 0, coefficient / total, 0.0)
