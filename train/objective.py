"""What training minimises: reconstruction in units of each layer's variance, and AuxK.

(1/B) Σ_rows ‖u − û‖² / V_l + aux, with V_l = Σ_d Var(u_d) over all eligible rows of layer l. Both
terms are sums over rows once B and the totals in them are those of the whole batch, so that pieces
of a batch, on one rank or several, add up to it exactly. AuxK: see `train/auxiliary.py`.

Shape suffixes: B rows, D channels, N latents, L layers, S sampled rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mlsae.base.errors import InputError
from mlsae.sae import SAE
from mlsae.sae.normalize import EPS
from mlsae.store import Moments
from mlsae.train import auxiliary
from mlsae.train.auxiliary import Residual, Sum

LOSS_SPACES = ("standardized", "raw")


class Losses(NamedTuple):
    """The main term of a piece of a batch, and what is counted on the way."""

    main: torch.Tensor
    """() the reconstruction term."""
    layer_errors: torch.Tensor
    """(L,) Σ ‖u − û‖² / V_l over the rows of each layer."""
    layer_rows: torch.Tensor
    """(L,) rows of each layer."""
    num_active: torch.Tensor
    """() Σ over rows of values above 0."""
    fired: torch.Tensor
    """(N,) 1 for a latent with a value above 0 on any row, else 0."""
    residual: Residual | None
    """What AuxK will explain; None without dead latents."""


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


class Objective:
    """The loss of a batch, and its gradient.

    Args:
        sae: what is trained.
        variances: (L,) V_l in the loss's space.
        loss_space: `standardized` or `raw`: where the main term is measured.
        mixed: select latents by a bfloat16 product.
        seed: of the rows that AuxK sees.
    """

    def __init__(
        self,
        sae: SAE,
        variances: npt.NDArray[np.float64],
        loss_space: str,
        *,
        mixed: bool = False,
        seed: int = 0,
    ) -> None:
        self._sae = sae
        weights = torch.from_numpy(1 / variances)
        self._weights_L = weights.to(sae.b.device, sae.b.dtype)
        self._raw = loss_space == "raw"
        self._mixed = mixed
        self._seed = seed
        self.k_aux = auxiliary.default_k_aux(sae.config.d_in)

    def accumulate(
        self, x_BD: torch.Tensor, layer_B: torch.Tensor, batch_rows: int, aux_step: int | None
    ) -> Losses:
        """The main term of some rows; its gradient is added to the parameters'.

        Args:
            x_BD: (B, D) rows, as stored; B may be 0.
            layer_B: (B,) their layers' indices.
            batch_rows: rows of the whole batch.
            aux_step: the step, where some latent is dead and AuxK will follow; else None.
        """
        sae = self._sae
        u_BD, _, scale_B1 = sae.standardize(x_BD)
        values_BK, support = sae.activate(u_BD, mixed=self._mixed)
        e_BD = u_BD - sae.reconstruct(values_BK, support)
        # In raw units x − x̂ = u (s + ε) − û s.
        loss_e_BD = torch.addcmul(EPS * u_BD, e_BD, scale_B1) if self._raw else e_BD
        errors_B = loss_e_BD.square().sum(dim=1) * self._weights_L[layer_B]
        main = errors_B.sum() / batch_rows
        torch.autograd.backward(main)
        num_layers = len(self._weights_L)
        fired = torch.zeros_like(sae.W_enc[:, 0])
        with torch.no_grad():
            active = values_BK > 0
            fired[support.indices_BK[active]] = 1
            layer_errors = fired.new_zeros(num_layers).index_add_(0, layer_B, errors_B)
            residual = None
            if aux_step is not None:
                chosen = auxiliary.sample(x_BD, batch_rows, self._seed, aux_step)
                residual = Residual(u_BD[chosen], e_BD[chosen])
        return Losses(
            main=main.detach(),
            layer_errors=layer_errors,
            layer_rows=torch.bincount(layer_B, minlength=num_layers),
            num_active=active.sum(),
            fired=fired,
            residual=residual,
        )

    def accumulate_auxiliary(
        self, residuals: Sequence[Residual], dead: torch.Tensor, sum_over_ranks: Sum
    ) -> torch.Tensor:
        """AuxK of this rank's share, coefficient included; its gradient is added, too.

        Args:
            residuals: of all its pieces.
            dead: indices of the dead latents, the same on every rank; not empty.
            sum_over_ranks: called equally often on every rank.
        """
        return auxiliary.accumulate(self._sae, residuals, dead, self.k_aux, sum_over_ranks)
