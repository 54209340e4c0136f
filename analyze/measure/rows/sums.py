"""Sums over rows from which every metric of a layer's reconstructions and latents follows.

Shapes: N rows, D = d_model, K = active slots a row, M = num_latents, G groups of sequences,
A = groups, or weighted sums over groups. Sums are float64 and int64.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float = npt.NDArray[np.float64]
Ratio = tuple[Float, Float]
"""Numerator and denominator, each (A,)."""

ROUNDING = 1e-26
"""Square of the relative error of a mean, at most: a smaller share of a squared norm is none."""

SINGLE = 1e-6
"""Relative error of a float32 reconstruction, at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSums:
    """Sums over sets of rows. x is a row, x̂ its reconstruction, c the reference."""

    reference: Float
    """c, (D,): any point near the rows, so that no precision is lost about their mean."""

    offset: Float
    """Σ(x − c), (A, D)."""

    scalars: Float
    """(A, 8), in `SCALARS`' order."""

    @property
    def num_rows(self) -> int:
        """Rows in all sets together."""
        return int(self.of("rows").sum())

    def of(self, name: str) -> Float:
        """One scalar by its name in `SCALARS`, (A,)."""
        return self.scalars[:, SCALARS.index(name)]

    def __add__(self, other: "RowSums") -> "RowSums":
        """Over both sets of rows, disjoint and with one reference."""
        return RowSums(
            reference=self.reference,
            offset=self.offset + other.offset,
            scalars=self.scalars + other.scalars,
        )

    def weighted(self, weights_RA: Float) -> "RowSums":
        """Each sum under each of R weightings over the sets."""
        return RowSums(
            reference=self.reference,
            offset=weights_RA @ self.offset,
            scalars=weights_RA @ self.scalars,
        )

    def fvu(self) -> Ratio:
        """Σ‖x − x̂‖² over Σ‖x − μ‖², μ each channel's mean over the rows."""
        return self.of("error"), self._scatter()

    def fvu_published(self) -> Ratio:
        """FVU about one scalar mean over rows and channels (arXiv 2409.04185, its code)."""
        num_rows = self.of("rows")
        mean = self.reference + self.offset / np.maximum(num_rows, 1)[:, None]
        between = num_rows * np.square(mean - mean.mean(axis=1, keepdims=True)).sum(axis=1)
        # Channels of one mean leave rounding, which is no variance.
        between = np.where(between > ROUNDING * num_rows * np.square(mean).sum(axis=1), between, 0)
        return self.of("error"), self._scatter() + between

    def ratios(self, num_latents: int) -> dict[str, Ratio]:
        """Every metric on the rows, by column of the table `layers`."""
        num_rows, width = self.of("rows"), len(self.reference)
        error, scatter = self.fvu()
        return {
            "fvu": (error, scatter),
            "fvu_published": self.fvu_published(),
            "explained_variance": (scatter - error, scatter),
            "mse": (error, num_rows * width),
            "cosine": (self.of("cosine"), num_rows),
            "relative_reconstruction_bias": (self.of("square"), self._agreement()),
            "l0": (self.of("active"), num_rows),
            "l1": (self.of("value"), num_rows),
            "density": (self.of("active"), num_rows * num_latents),
        }

    def _agreement(self) -> Float:
        """Σ⟨x, x̂⟩, 0 where x̂ has no more of x than the rounding of float32, (A,)."""
        dot, ends = self.of("dot"), self.offset @ self.reference
        square = self.of("about") + 2 * ends
        square += self.of("rows") * np.square(self.reference).sum()
        least = SINGLE * np.sqrt(np.maximum(square, 0) * self.of("square"))
        return np.where(dot > least, dot, 0.0)

    def _scatter(self) -> Float:
        """Σ‖x − μ‖², (A,)."""
        num_rows, about = self.of("rows"), self.of("about")
        scatter = about - np.square(self.offset).sum(axis=1) / np.maximum(num_rows, 1)
        # Rows that do not vary leave rounding, which is no variance.
        rounding = 1e-14 * about + ROUNDING * num_rows * np.square(self.reference).sum()
        return np.where(scatter > rounding, scatter, 0.0)


SCALARS = ("rows", "about", "error", "cosine", "dot", "square", "active", "value")
"""Sums over rows of 1, ‖x − c‖², ‖x − x̂‖², cos(x, x̂), ⟨x, x̂⟩, ‖x̂‖², the number of active
latents and the sum of their sizes |z|."""


class GroupedRows:
    """Adds up rows by key, one batch after another."""

    def __init__(self, num_keys: int, reference_D: Float, device: torch.device) -> None:
        self._reference = torch.from_numpy(reference_D).to(device)
        self._offset = torch.zeros(num_keys, len(reference_D), dtype=torch.float64, device=device)
        self._scalars = torch.zeros(num_keys, len(SCALARS), dtype=torch.float64, device=device)

    def add(self, keys_N: Tensor, x_ND: Tensor, x_hat_ND: Tensor, values_NK: Tensor) -> None:
        """Add rows with their reconstructions and latents' values; fast where equal keys meet."""
        x, x_hat = x_ND.double(), x_hat_ND.double()
        centred = x - self._reference
        square, dot = _dot(x_hat, x_hat), _dot(x, x_hat)
        norms = (_dot(x, x) * square).sqrt()
        values = values_NK.abs()
        scalars_NC = torch.stack(
            [
                torch.ones_like(dot),
                _dot(centred, centred),
                (x - x_hat).square_().sum(1),
                torch.where(norms > 0, dot / norms, 0.0),
                dot,
                square,
                (values > 0).sum(1).double(),
                values.double().sum(1),
            ],
            dim=1,
        )
        keys, lengths = torch.unique_consecutive(keys_N, return_counts=True)
        for total, part in ((self._offset, centred), (self._scalars, scalars_NC)):
            total.index_add_(0, keys, torch.segment_reduce(part, "sum", lengths=lengths))

    def sums(self, first: int, last: int) -> RowSums:
        """Sums under the keys from `first` to before `last`, in their order."""
        return RowSums(
            reference=self._reference.cpu().numpy(),
            offset=self._offset[first:last].cpu().numpy(),
            scalars=self._scalars[first:last].cpu().numpy(),
        )


class PrefixSums:
    """Errors and active latents of each prefix of an SAE's latents, at one layer.

    Args:
        prefixes: G widths, the last of them that of all latents.
        device: device of the sums.
    """

    def __init__(self, prefixes: tuple[int, ...], device: torch.device) -> None:
        self._prefixes = prefixes
        self.sums = torch.zeros(2, len(prefixes), dtype=torch.float64, device=device)
        """(2, G) Σ‖x − x̂‖² by each prefix, and the number of active latents in it."""

    def add(self, x_ND: Tensor, x_hat_NGD: Tensor, values_NK: Tensor, indices_NK: Tensor) -> None:
        """Add rows with their reconstructions by each prefix, and their latents."""
        active = values_NK != 0
        for at, width in enumerate(self._prefixes):
            self.sums[0, at] += (x_ND.double() - x_hat_NGD[:, at].double()).square_().sum()
            self.sums[1, at] += (active & (indices_NK < width)).sum()


class CosineSum:
    """Mean over rows of the cosine of two vectors of each, 0 where either has no direction."""

    def __init__(self, device: torch.device) -> None:
        self._total, self._defined = torch.zeros(2, dtype=torch.float64, device=device)
        self._num_rows = 0

    def add(self, a_ND: Tensor, b_ND: Tensor) -> None:
        """Add rows, float64."""
        norms = (_dot(a_ND, a_ND) * _dot(b_ND, b_ND)).sqrt()
        self._total += torch.where(norms > 0, _dot(a_ND, b_ND) / norms, 0.0).sum()
        self._defined += (norms > 0).sum()
        self._num_rows += len(a_ND)

    def mean(self) -> float | None:
        """The mean; None where no row has a cosine."""
        return float(self._total) / self._num_rows if self._defined > 0 else None


def centred(x_ND: Tensor, mean_D: Tensor) -> Tensor:
    """Rows about a point, float64; a row that is there but for rounding is 0."""
    x = x_ND.double() - mean_D
    return x * (_dot(x, x) > ROUNDING * _dot(mean_D, mean_D))[:, None]


def _dot(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    dot: Tensor = torch.linalg.vecdot(a_ND, b_ND)
    return dot


class LatentSums:
    """Active rows (value not 0) counted by latent at one layer, and total |z|."""

    def __init__(self, num_latents: int, device: torch.device) -> None:
        self.count = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.total = torch.zeros(num_latents, dtype=torch.float64, device=device)

    def add(self, values_NK: Tensor, indices_NK: Tensor) -> None:
        """Count the rows of `values_NK` at the latents `indices_NK`; a value of 0 is inactive."""
        values_NK = values_NK.abs()
        active = values_NK > 0
        indices = indices_NK[active]
        num_latents = len(self.count)
        self.count += torch.bincount(indices, minlength=num_latents)
        self.total += torch.bincount(
            indices, weights=values_NK[active].double(), minlength=num_latents
        )
