"""Products with a (rows × latents) matrix that is known by its support.

Where that is some latents of each row, all three run as bags of gathered rows or sampled dot
products, on CPU and CUDA; their cost does not grow with the number of latents. Where it is every
latent they are dense products.

Shape suffixes: B rows, D channels, N latents, K selected latents, E entries of all rows.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import embedding_bag


class Support:
    """Where a batch's latent values are not zero: K latents of each row.

    Args:
        indices_BK: (B, K) int64 latent indices, each at most once a row.
        num_latents: N.
    """

    def __init__(self, indices_BK: torch.Tensor, num_latents: int) -> None:
        self.indices_BK = indices_BK
        self.num_latents = num_latents

    @functools.cached_property
    def _by_latent(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The transpose: order of the entries by latent, their rows, each latent's offset."""
        flat = self.indices_BK.reshape(-1).to(torch.int32)
        order = torch.sort(flat, stable=True).indices
        counts = torch.bincount(flat, minlength=self.num_latents)
        rows = torch.div(order, self.indices_BK.shape[1], rounding_mode="floor")
        return order, rows, counts.cumsum(0) - counts

    def transpose_product(self, values_BK: torch.Tensor, dense_BD: torch.Tensor) -> torch.Tensor:
        """Zᵀ X for the sparse Z (B, N) with these values: (N, D).

        Each latent's row is a bag of the rows that use it, so no two rows write one place and the
        result does not depend on scheduling.
        """
        order, rows, offsets = self._by_latent
        weights = values_BK.reshape(-1)[order]
        return embedding_bag(rows, dense_BD, offsets, mode="sum", per_sample_weights=weights)

    def product(self, values_BK: torch.Tensor, W_ND: torch.Tensor) -> torch.Tensor:
        """Z W for the sparse Z (B, N) with these values: (B, D)."""
        return embedding_bag(self.indices_BK, W_ND, mode="sum", per_sample_weights=values_BK)

    def sampled_product(self, x_BD: torch.Tensor, W_ND: torch.Tensor) -> torch.Tensor:
        """x Wᵀ at the support alone: (B, K) dot products of each row with its K latents' rows."""
        num_rows, k = self.indices_BK.shape
        starts = torch.arange(0, num_rows * k + 1, k, device=x_BD.device)
        return _sampled(x_BD, W_ND, starts, self.indices_BK.reshape(-1)).view(num_rows, k)

    def counts(self, chosen: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """(B, G) chosen entries of each row among the first so many latents.

        Args:
            chosen: mask of the values' shape.
            widths: G numbers of latents, ascending, the last of them N.
        """
        parts = [(chosen & (self.indices_BK < width)).sum(dim=1) for width in widths[:-1]]
        return torch.stack([*parts, chosen.sum(dim=1)], dim=1)

    def nested(self, values: torch.Tensor, widths: Sequence[int]) -> tuple[torch.Tensor, "Entries"]:
        """Each row's entries as those of one row for each range of latents.

        Args:
            values: (B, K), or (E,) for `Entries`.
            widths: ends of the ranges, ascending, the last of them N.

        Returns:
            (E,) values, with gradients, and their places in B · len(widths) rows.
        """
        latents_BK, order_BK = self.indices_BK.sort(dim=1)
        rows_B = torch.arange(len(latents_BK), device=latents_BK.device)
        rows_E = rows_B.repeat_interleave(latents_BK.shape[1])
        parts = _cut(rows_E, latents_BK.reshape(-1), len(rows_B), widths)
        return values.gather(1, order_BK).reshape(-1), parts


class Entries(Support):
    """Some latents of each row, of one more than of another: values are (E,), row after row.

    Args:
        latents_E: (E,) int64, ascending in each row.
        starts_B: (B,) int64 place of each row's first entry, or of the next row's where it has
            none.
        num_latents: N.
    """

    def __init__(self, latents_E: torch.Tensor, starts_B: torch.Tensor, num_latents: int) -> None:
        super().__init__(latents_E, num_latents)
        self._starts_B = starts_B

    @classmethod
    def of_rows(
        cls, rows_E: torch.Tensor, latents_E: torch.Tensor, num_rows: int, num_latents: int
    ) -> "Entries":
        """Entries by their rows, ascending, instead of the rows' starts."""
        counts = torch.bincount(rows_E, minlength=num_rows)
        return cls(latents_E, counts.cumsum(0) - counts, num_latents)

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        """(E,) row of each entry."""
        ends = torch.arange(len(self.indices_BK), device=self.indices_BK.device)
        return torch.searchsorted(self._starts_B, ends, right=True) - 1

    @functools.cached_property
    def _by_latent(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        order = torch.sort(self.indices_BK.to(torch.int32), stable=True).indices
        counts = torch.bincount(self.indices_BK, minlength=self.num_latents)
        return order, self.rows[order], counts.cumsum(0) - counts

    def product(self, values_E: torch.Tensor, W_ND: torch.Tensor) -> torch.Tensor:
        """Z W for the sparse Z (B, N) with these values: (B, D)."""
        return embedding_bag(
            self.indices_BK, W_ND, self._starts_B, mode="sum", per_sample_weights=values_E
        )

    def sampled_product(self, x_BD: torch.Tensor, W_ND: torch.Tensor) -> torch.Tensor:
        """x Wᵀ at the support alone: (E,)."""
        end = self._starts_B.new_tensor([len(self.indices_BK)])
        return _sampled(x_BD, W_ND, torch.cat([self._starts_B, end]), self.indices_BK)

    def nested(self, values: torch.Tensor, widths: Sequence[int]) -> tuple[torch.Tensor, "Entries"]:
        """Entries as `Support` gives them; here they are in order already."""
        return values, _cut(self.rows, self.indices_BK, len(self._starts_B), widths)

    def counts(self, chosen: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """Counts as `Support` gives them."""
        num_rows = len(self._starts_B)
        bags_E = _bags(self.rows[chosen], self.indices_BK[chosen], widths)
        counts = torch.bincount(bags_E, minlength=num_rows * len(widths))
        return counts.view(num_rows, len(widths)).cumsum(dim=1)


def _cut(
    rows_E: torch.Tensor, latents_E: torch.Tensor, num_rows: int, widths: Sequence[int]
) -> Entries:
    bags_E = _bags(rows_E, latents_E, widths)
    return Entries.of_rows(bags_E, latents_E, num_rows * len(widths), widths[-1])


def _bags(rows_E: torch.Tensor, latents_E: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """(E,) the range of its row that each entry lies in, counted over rows."""
    ends = torch.tensor(widths[:-1], dtype=torch.int64, device=rows_E.device)
    return rows_E * len(widths) + torch.bucketize(latents_E, ends, right=True)


class FullSupport(Support):
    """Every latent of each row: for values that are mostly not zero.

    Args:
        num_rows: B.
        num_latents: N, which is K, too.
        device: device of the products.
    """

    def __init__(self, num_rows: int, num_latents: int, device: torch.device) -> None:
        one = torch.arange(num_latents, device=device)
        super().__init__(one.expand(num_rows, num_latents), num_latents)

    def transpose_product(self, values_BK: torch.Tensor, dense_BD: torch.Tensor) -> torch.Tensor:
        """Zᵀ X: (N, D)."""
        return values_BK.T @ dense_BD

    def product(self, values_BK: torch.Tensor, W_ND: torch.Tensor) -> torch.Tensor:
        """Z W: (B, D)."""
        return values_BK @ W_ND

    def sampled_product(self, x_BD: torch.Tensor, W_ND: torch.Tensor) -> torch.Tensor:
        """x Wᵀ: (B, N)."""
        return x_BD @ W_ND.T


def _sampled(
    x_BD: torch.Tensor, W_ND: torch.Tensor, starts: torch.Tensor, latents_E: torch.Tensor
) -> torch.Tensor:
    """(E,) products at entries; `starts` (B + 1,) begins with 0 and ends with E."""
    if x_BD.dtype in (torch.bfloat16, torch.float16):
        # torch has no such product in 16 bits.
        return _sampled(x_BD.float(), W_ND.float(), starts, latents_E).to(x_BD.dtype)
    sampled: torch.Tensor = torch.ops.mlsae.sampled_product(x_BD, W_ND, starts, latents_E)
    return sampled


def _sampled_product(
    x_BD: torch.Tensor, W_ND: torch.Tensor, starts: torch.Tensor, latents_E: torch.Tensor
) -> torch.Tensor:
    _silence_beta_warning()
    places = torch.sparse_csr_tensor(
        starts,
        latents_E,
        x_BD.new_zeros(len(latents_E)),
        size=(len(x_BD), len(W_ND)),
        check_invariants=False,
    )
    sampled: torch.Tensor = torch.sparse.sampled_addmm(places, x_BD, W_ND.T, beta=0.0)
    return sampled.values()


_library: Any = torch.library  # torch leaves it untyped
_OPERATORS = _library.Library("mlsae", "DEF")
"""Operators of torch's dispatcher, which takes entry by entry the batches of tensors of its own
kind that `torch.autograd.functional.jacobian(vectorize=True)` makes; a sparse tensor cannot be
one."""
_OPERATORS.define("sampled_product(Tensor x, Tensor W, Tensor starts, Tensor latents) -> Tensor")
_OPERATORS.impl("sampled_product", _sampled_product, "CompositeExplicitAutograd")


@functools.cache
def _silence_beta_warning() -> None:
    """torch says once a process that its CSR tensors are in beta; nothing a user could act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 1], [0], [0.0], size=(1, 1))
