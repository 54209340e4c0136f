"""Products with a (rows × latents) matrix that is known by its support.

Where that is some latents of each row, all three run as bags of gathered rows or sampled dot
products, on CPU and CUDA; their cost does not grow with the number of latents. Where it is every
latent they are dense products.

Shape suffixes: B rows, D channels, N latents, K selected latents.
"""

import functools
import warnings
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
        if x_BD.dtype in (torch.bfloat16, torch.float16):
            # torch has no such product in 16 bits.
            return self.sampled_product(x_BD.float(), W_ND.float()).to(x_BD.dtype)
        sampled: torch.Tensor = torch.ops.mlsae.sampled_product(x_BD, W_ND, self.indices_BK)
        return sampled


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


def _sampled_product(
    x_BD: torch.Tensor, W_ND: torch.Tensor, indices_BK: torch.Tensor
) -> torch.Tensor:
    _silence_beta_warning()
    num_rows, k = indices_BK.shape
    places = torch.sparse_csr_tensor(
        torch.arange(0, num_rows * k + 1, k, device=x_BD.device),
        indices_BK.reshape(-1),
        x_BD.new_zeros(num_rows * k),
        size=(num_rows, len(W_ND)),
        check_invariants=False,
    )
    sampled: torch.Tensor = torch.sparse.sampled_addmm(places, x_BD, W_ND.T, beta=0.0)
    return sampled.values().view(num_rows, k)


_library: Any = torch.library  # torch leaves it untyped
_OPERATORS = _library.Library("mlsae", "DEF")
"""Operators of torch's dispatcher, which takes entry by entry the batches of tensors of its own
kind that `torch.autograd.functional.jacobian(vectorize=True)` makes; a sparse tensor cannot be
one."""
_OPERATORS.define("sampled_product(Tensor x, Tensor W, Tensor indices) -> Tensor")
_OPERATORS.impl("sampled_product", _sampled_product, "CompositeExplicitAutograd")


@functools.cache
def _silence_beta_warning() -> None:
    """torch says once a process that its CSR tensors are in beta; nothing a user could act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 1], [0], [0.0], size=(1, 1))
