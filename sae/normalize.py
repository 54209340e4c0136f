"""Row normalisation: every row is put on one scale, whatever its layer.

Shape suffixes: B rows, D channels.
"""

from typing import NamedTuple

import torch

EPS = 1e-5
"""Added to the standard deviation where a row is divided by it, and nowhere else."""


class Standardized(NamedTuple):
    """A batch of rows in units of their own spread, and what leads back."""

    u: torch.Tensor
    """(B, D) (x − mean) / (scale + EPS); x itself where rows are not normalised."""
    mean: torch.Tensor
    """(B, 1) mean over the row's channels; 0 where rows are not normalised."""
    scale: torch.Tensor
    """(B, 1) unbiased standard deviation over the row's channels; 1 where not normalised."""


def standardize(x_BD: torch.Tensor) -> Standardized:
    """u = (x − m(x)) / (s(x) + 1e-5) with s the unbiased standard deviation of the row.

    Source: Gao et al. (2024), arXiv 2406.04093, whose released TopK models normalise so; Lawson et
    al. (2024), arXiv 2409.04185. The way back, x̂ = û · s + m, has no epsilon.
    """
    mean_B1 = x_BD.mean(dim=1, keepdim=True)
    centred_BD = x_BD - mean_B1
    length_B1 = torch.linalg.vector_norm(centred_BD, dim=1, keepdim=True)
    scale_B1 = length_B1 / (x_BD.shape[1] - 1) ** 0.5
    return Standardized(centred_BD / (scale_B1 + EPS), mean_B1, scale_B1)


def leave(x_BD: torch.Tensor) -> Standardized:
    """Rows that are not normalised: u = x, so that `restore` changes nothing either."""
    zeros_B1 = x_BD.new_zeros(len(x_BD), 1)
    return Standardized(x_BD, zeros_B1, zeros_B1 + 1)


def restore(u_BD: torch.Tensor, mean_B1: torch.Tensor, scale_B1: torch.Tensor) -> torch.Tensor:
    """x̂ = û · s + m: (B, D) in the rows' own units."""
    return u_BD * scale_B1 + mean_B1
