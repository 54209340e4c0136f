"""Sums over rows from which every reconstruction and latent figure of a layer follows.

Shapes: N rows, D = d_model, K = active slots a row, M = num_latents. Sums are float64 and int64.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowSums:
    """What a set of rows adds up to; disjoint sets merge exactly (Chan et al., 1983)."""

    num_rows: int
    """How many rows."""

    mean: Tensor
    """Mean over the rows, by channel; float64."""

    scatter: Tensor
    """Σ‖x − mean‖², float64, a scalar."""

    error: Tensor
    """Σ‖x − x̂‖², float64, a scalar."""

    @classmethod
    def empty(cls, d_model: int, device: torch.device) -> Self:
        """The sums over no rows."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(0, torch.zeros(d_model, dtype=torch.float64, device=device), zero, zero)

    @classmethod
    def of(cls, x_ND: Tensor, x_hat_ND: Tensor) -> Self:
        """The sums over the rows `x_ND` and their reconstructions; N may be 0."""
        if len(x_ND) == 0:
            return cls.empty(x_ND.shape[1], x_ND.device)
        x = x_ND.double()
        mean = x.mean(0)
        return cls(
            num_rows=len(x),
            mean=mean,
            scatter=(x - mean).square().sum(),
            error=(x - x_hat_ND.double()).square().sum(),
        )

    def merge(self, other: "RowSums") -> "RowSums":
        """The sums over both sets of rows."""
        if other.num_rows == 0:
            return self
        num_rows = self.num_rows + other.num_rows
        weight = other.num_rows / num_rows
        shift = other.mean - self.mean
        return RowSums(
            num_rows=num_rows,
            mean=self.mean + shift * weight,
            scatter=self.scatter + other.scatter + shift.square().sum() * self.num_rows * weight,
            error=self.error + other.error,
        )

    def fvu(self) -> float | None:
        """Σ‖x − x̂‖² / Σ‖x − μ‖², μ the mean of each channel; None where rows do not vary."""
        return _ratio(self.error, self.scatter)

    def fvu_published(self) -> float | None:
        """The same about one scalar mean over rows and channels (arXiv 2409.04185, its code)."""
        between = (self.mean - self.mean.mean()).square().sum() * self.num_rows
        return _ratio(self.error, self.scatter + between)

    def mse(self) -> float | None:
        """Mean squared error over rows and channels; None without rows."""
        if self.num_rows == 0:
            return None
        return float(self.error) / (self.num_rows * len(self.mean))


def merge_all(parts: list[RowSums]) -> RowSums:
    """The sums over the rows of all `parts`, at least one."""
    return reduce(RowSums.merge, parts)


def _ratio(numerator: Tensor, denominator: Tensor) -> float | None:
    return float(numerator) / float(denominator) if float(denominator) > 0 else None


class LatentSums:
    """How often each latent is active (value > 0) at one layer, and its values' total."""

    def __init__(self, num_latents: int, device: torch.device) -> None:
        self.count = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.total = torch.zeros(num_latents, dtype=torch.float64, device=device)

    def add(self, values_NK: Tensor, indices_NK: Tensor) -> None:
        """Count the rows of `values_NK` at the latents `indices_NK`; a value of 0 is inactive."""
        active = values_NK > 0
        indices = indices_NK[active]
        num_latents = len(self.count)
        self.count += torch.bincount(indices, minlength=num_latents)
        self.total += torch.bincount(
            indices, weights=values_NK[active].double(), minlength=num_latents
        )
