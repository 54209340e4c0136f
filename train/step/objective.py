"""Training loss: reconstruction in units of each layer's variance, and a penalty on latents.

(1/B) Σ_rows [w_l ‖u − û‖² / V_l + λ_l penalty] + aux, with V_l = Σ_d Var(u_d) over all eligible
rows of layer l, and weights w_l that are 1 unless asked for. Where prefixes of the latents
reconstruct rows by themselves, ‖u − û‖² is its mean over them. The penalty is the architecture's,
with λ_l = λ · (multiplier of the layer), rising from 0 over the first steps. All terms are sums
over rows once B and the totals in them are the whole batch's, so that pieces of a batch, on
one rank or several, add up to it exactly. aux is what revives dead latents, where the architecture
does so by a term: AuxK (`train/step/auxiliary.py`) or the pre-activation loss
(`train/step/preactivation.py`).

Shape suffixes: B rows, D channels, N latents, L layers, G prefixes, S sampled rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mlsae.base.errors import InputError
from mlsae.sae import SAE
from mlsae.sae.architectures.base import ExtraLoss, TrainingRows
from mlsae.store import Moments
from mlsae.train.step import auxiliary, preactivation, resample
from mlsae.train.step.auxiliary import Residual, Sum
from mlsae.train.step.resample import Candidates, Resampling
from mlsae.train.step.spread import least_share

LOSS_SPACES = ("standardized", "raw")


class Losses(NamedTuple):
    """The main term on a piece of a batch, with counts."""

    main: torch.Tensor
    """() the reconstruction term and the penalty."""
    penalty: torch.Tensor
    """() the penalty's part in it."""
    layer_errors: torch.Tensor
    """(L,) Σ ‖u − û‖² / V_l over each layer's rows."""
    layer_rows: torch.Tensor
    """(L,) rows by layer."""
    num_active: torch.Tensor
    """() number of values that are not 0."""
    nested: torch.Tensor
    """(2, G, L) for each prefix of latents and over each layer's rows, Σ ‖u − û_g‖² / V_l, and the
    number of values that are not 0; the last prefix has all latents."""
    fired: torch.Tensor
    """(N,) 1 for a latent with a value that is not 0 on any row, else 0."""
    residual: Residual | None
    """Residual that AuxK will explain; None without dead latents."""
    candidates: Candidates | None
    """Rows for dead latents to be drawn from; None where none are resampled."""


def layer_variances(
    moments: Moments, layers: tuple[int, ...], loss_space: str, normalize: str = "standardize"
) -> npt.NDArray[np.float64]:
    """(L,) Σ_d Var(u_d) of standardised rows, else Σ_d Var(x_d), over the rows of the moments.

    Where rows are multiplied by a factor of their layer, so are errors: ‖u − û‖² / V_l is
    ‖x − x̂‖² / Σ_d Var(x_d), and the objective counts it so.

    Raises:
        InputError: a layer does not vary.
    """
    at = [moments.layers.index(layer) for layer in layers]
    in_u = loss_space != "raw" and normalize == "standardize"
    m2, mean = (moments.u_m2, moments.u_mean) if in_u else (moments.m2, moments.mean)
    variances: npt.NDArray[np.float64] = m2[at].sum(axis=1) / moments.count
    squares = variances + np.square(mean[at]).sum(axis=1)
    least = least_share(standardized=in_u) * squares
    for layer, variance, too_little in zip(layers, variances.tolist(), least, strict=True):
        if not variance > too_little:
            raise InputError(
                f"the activations of layer {layer} do not vary (variance {variance:g}): there is "
                f"nothing to reconstruct; leave it out with --layers"
            )
    return variances


class Objective:
    """A batch's loss, and its gradient.

    Args:
        sae: the SAE in training.
        variances: (L,) result of `layer_variances`.
        loss_space: `standardized` or `raw`: where the main term is measured.
        mixed: select latents by a bfloat16 product.
        seed: seed for the rows that AuxK sees and that resampling draws.
        layer_weights: (L,) w_l; None for 1.
        extra: the architecture's further term; None for none.
        resampling: when dead latents are drawn anew; None for never.
        settings: training settings that the architecture asks for, as it resolves them.
    """

    def __init__(
        self,
        sae: SAE,
        variances: npt.NDArray[np.float64],
        loss_space: str,
        *,
        mixed: bool = False,
        seed: int = 0,
        layer_weights: Sequence[float] | None = None,
        extra: ExtraLoss | None = None,
        resampling: Resampling | None = None,
        settings: Any = None,
    ) -> None:
        self._sae = sae
        weights = torch.from_numpy(1 / variances)
        self._weights_L = weights.to(sae.b.device, sae.b.dtype)
        self._terms_L = None if layer_weights is None else self._weights_L.new_tensor(layer_weights)
        self.extra = extra
        self._settings = settings
        self.resampling = resampling
        # Rows that are standardised have two spaces; others one error, in units of its variance.
        self._raw = loss_space == "raw" or sae.config.normalize != "standardize"
        self._eps = sae.config.eps if sae.config.normalize == "standardize" else 0.0
        self._mixed = mixed
        self._seed = seed
        self.k_aux = auxiliary.default_k_aux(sae.config.d_in)

    @property
    def most_rows(self) -> int | None:
        """Rows that one call of `accumulate` is best given; None for any number."""
        sae = self._sae
        return sae.architecture.most_rows(sae.config.num_latents, sae.b.element_size())

    @property
    def takes_groups(self) -> bool:
        """True where `accumulate` takes whole groups of rows."""
        return self._sae.architecture.selects_by_group

    @property
    def has_auxiliary(self) -> bool:
        """True where a further term of the loss revives dead latents."""
        return self._sae.architecture.revival in ("auxk", "preactivation")

    def accumulate(
        self,
        x_BD: torch.Tensor,
        layer_B: torch.Tensor,
        batch_rows: int,
        aux_step: int | None,
        *,
        step: int = 0,
        num_candidates: int = 0,
        groups: tuple[int, ...] = (),
    ) -> Losses:
        """The main term on some rows; its gradient is added to the parameters'.

        Args:
            x_BD: (B, D) rows, as stored; B may be 0.
            layer_B: (B,) their layers' indices.
            batch_rows: rows in the whole batch.
            aux_step: the step, where some latent is dead and AuxK will follow; else None.
            step: step in the run, from 0.
            num_candidates: number of rows that resampling asks for.
            groups: rows of each group, one after another, where latents are selected by group.
        """
        sae = self._sae
        u_BD, _, scale_B1 = sae.standardize(x_BD, layer_B)
        weight_B = self._weights_L[layer_B]
        if self._terms_L is not None:
            weight_B = weight_B * self._terms_L[layer_B]
        if self._raw:
            weight_B = weight_B * scale_B1[:, 0].square()
        rows = TrainingRows(u_BD, layer_B, step, groups, weight_B, self._settings)
        active = sae.activate_in_training(rows, mixed=self._mixed)
        values, support = active.values, active.support
        e_BGD = u_BD[:, None] - sae.reconstructions(values, support)
        # In raw units x − x̂ = u (s + ε) − û s.
        loss_e_BGD = e_BGD
        if self._raw:
            loss_e_BGD = torch.addcmul(self._eps * u_BD[:, None], e_BGD, scale_B1[:, None])
        errors_BG = loss_e_BGD.square().sum(dim=2) * self._weights_L[layer_B, None]
        loss_B = errors_BG.mean(dim=1)
        if self._terms_L is not None:
            loss_B = loss_B * self._terms_L[layer_B]
        cost = errors_BG.new_zeros(())
        if self.extra is not None:
            cost_B = self.extra(active, rows, sae.weights)
            loss_B = loss_B + cost_B
            cost = cost_B.detach().sum() / batch_rows
        main = loss_B.sum() / batch_rows
        torch.autograd.backward(main)
        fired = torch.zeros_like(sae.W_enc[:, 0])
        with torch.no_grad():
            is_active = values != 0
            fired[support.indices_BK[is_active]] = 1
            active_BG = support.counts(is_active, sae.config.prefixes)
            nested = torch.stack([self._by_layer(n, layer_B) for n in (errors_BG, active_BG)])
            e_BD = e_BGD[:, -1]
            residual = candidates = None
            if aux_step is not None:
                chosen = auxiliary.sample(x_BD, batch_rows, self._seed, aux_step)
                residual = Residual(u_BD[chosen], e_BD[chosen])
            if num_candidates:
                keys_B = resample.keys(x_BD, loss_B, self._seed, step)
                c_BD = u_BD - sae.b
                # A row at b has no direction.
                keys_B = keys_B.where(c_BD.any(dim=1), torch.inf)
                candidates = Candidates(keys_B, c_BD).first(num_candidates)
        return Losses(
            main=main.detach(),
            penalty=cost,
            layer_errors=nested[0, -1],
            layer_rows=torch.bincount(layer_B, minlength=len(self._weights_L)),
            num_active=is_active.sum(),
            nested=nested,
            fired=fired,
            residual=residual,
            candidates=candidates,
        )

    def _by_layer(self, of_rows_BG: torch.Tensor, layer_B: torch.Tensor) -> torch.Tensor:
        """(G, L) sums over each layer's rows."""
        sums_LG = self._weights_L.new_zeros(len(self._weights_L), of_rows_BG.shape[1])
        return sums_LG.index_add_(0, layer_B, of_rows_BG.to(sums_LG.dtype)).T

    def accumulate_auxiliary(
        self, residuals: Sequence[Residual], dead: torch.Tensor, sum_over_ranks: Sum
    ) -> torch.Tensor:
        """Term that revives dead latents, on this rank's share; its gradient is added, too.

        Args:
            residuals: residuals from all its pieces.
            dead: indices of the dead latents, the same on every rank; not empty.
            sum_over_ranks: called equally often on every rank.
        """
        if self._sae.architecture.revival == "preactivation":
            return preactivation.accumulate(self._sae, residuals, dead, sum_over_ranks)
        return auxiliary.accumulate(self._sae, residuals, dead, self.k_aux, sum_over_ranks)
