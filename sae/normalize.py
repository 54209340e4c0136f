"""Row normalisation: from a row to the encoder's input, and back to the row's own units.

- `standardize`: by the row's own mean and standard deviation, whatever its layer.
- `none`: u = x.
- `scale`: u = f_l x, f_l = √(d / E‖x‖²) over the rows of layer l, so that E‖u‖² = d there.
- `center`: u = x − μ_l, the mean of layer l.
- a layer scale, beside `none`: u = s_l x with s_l = mean_l'(f(n_l')) / f(n_l), n_l the mean norm of
  layer l and f the logarithm, the square root or the identity. Source: collingray's multi-layer
  SAEs on MLP outputs, https://github.com/collingray/autoencoders.

The last three have state by layer: `layer_factor` (L,) holds f_l or s_l, `layer_shift` (L, D) μ_l.

Shape suffixes: B rows, D channels, L layers.
"""

from typing import NamedTuple

import torch

EPS = 1e-5
"""Added to the standard deviation where a row is divided by it, and nowhere else; `SAEConfig.eps`
may be less."""


class Standardized(NamedTuple):
    """A batch of rows in units of their own spread, with the statistics that lead back."""

    u: torch.Tensor
    """(B, D) (x − mean) / (scale + eps) of standardised rows, (x − mean) / scale of others."""
    mean: torch.Tensor
    """(B, 1) mean over the row's channels, or 0; (B, D) of its layer where rows are centred so."""
    scale: torch.Tensor
    """(B, 1) unbiased standard deviation over the row's channels; 1 over its layer's factor."""


def standardize(x_BD: torch.Tensor, eps: float = EPS) -> Standardized:
    """u = (x − m(x)) / (s(x) + eps) with s the unbiased standard deviation of the row.

    Source: Gao et al. (2024), arXiv 2406.04093, whose released TopK models normalise so; Lawson et
    al. (2024), arXiv 2409.04185. The way back, x̂ = û · s + m, has no epsilon.
    """
    mean_B1 = x_BD.mean(dim=1, keepdim=True)
    centred_BD = x_BD - mean_B1
    length_B1 = torch.linalg.vector_norm(centred_BD, dim=1, keepdim=True)
    scale_B1 = length_B1 / (x_BD.shape[1] - 1) ** 0.5
    return Standardized(centred_BD / (scale_B1 + eps), mean_B1, scale_B1)


def by_layer(
    x_BD: torch.Tensor,
    at: torch.Tensor | int,
    shift_LD: torch.Tensor | None,
    factor_L: torch.Tensor | None,
) -> Standardized:
    """u = factor_l (x − shift_l).

    Args:
        x_BD: (B, D) rows.
        at: row of the state for the layer of each row: (B,), or one for all.
        shift_LD: (L, D); None for 0.
        factor_L: (L,); None for 1.
    """
    mean_BD = zeros_B1 = x_BD.new_zeros(len(x_BD), 1)
    scale_B1 = zeros_B1 + 1
    u_BD = x_BD
    if shift_LD is not None:
        mean_BD = shift_LD[at].expand(x_BD.shape)
        u_BD = u_BD - mean_BD
    if factor_L is not None:
        factor_B1 = factor_L[at].reshape(-1, 1).expand(len(x_BD), 1)
        scale_B1 = 1 / factor_B1
        u_BD = u_BD * factor_B1
    return Standardized(u_BD, mean_BD, scale_B1)


def restore(u_BD: torch.Tensor, mean_BD: torch.Tensor, scale_B1: torch.Tensor) -> torch.Tensor:
    """x̂ = û · s + m: (B, D) in the rows' own units."""
    return u_BD * scale_B1 + mean_BD
