"""ReLU with an L1 penalty: a row uses every latent with a pre-activation above 0.

z = ReLU(W_enc (u − b) + b_enc), penalty Σ_j z_j ‖W_dec,j‖, with decoder rows of any length. Source:
Conerly et al. (2024), "Update on how we train SAEs", Transformer Circuits Thread, April 2024.

Shape suffixes: B rows, D channels, N latents, K latents of a row, E entries above 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mlsae.sae.architectures.base import Weights
from mlsae.sae.kernels.functions import bag, preactivations
from mlsae.sae.kernels.select import BLOCK_BYTES
from mlsae.sae.kernels.sparse import FullSupport, Support

_DENSE = 8
"""Dense products pay where some row uses more than 1 in so many latents."""


@dataclass(frozen=True)
class ReLU:
    """The architecture `relu`."""

    unit_decoder: bool = False
    """As for every architecture."""

    def most_rows(self, num_latents: int, element_size: int) -> int | None:
        """As many as make a block of rows × latents."""
        return _block_rows(num_latents, element_size)

    def activate(
        self,
        u_BD: torch.Tensor,
        weights: Weights,
        *,
        mixed: bool,  # noqa: ARG002
    ) -> tuple[torch.Tensor, Support]:
        """All latents above 0; K is the largest number of them that any row has, at least 1.

        Rows with fewer are filled up with latents that are 0. A single block of rows in which
        latents are many has every latent of each row instead. `mixed` makes no difference.
        """
        W_enc, _, b, b_enc = weights
        support: Support
        with torch.no_grad():
            c_BD = u_BD - b
            if len(c_BD) <= _block_rows(len(W_enc), c_BD.element_size()):
                pre_BK = _product(c_BD, W_enc, b_enc)
                most = int((pre_BK > 0).sum(dim=1).amax()) if len(c_BD) else 0
                if most * _DENSE > len(W_enc):
                    support = FullSupport(len(c_BD), len(W_enc), c_BD.device)
                else:
                    pre_BK, indices_BK = listed([pre_BK], len(W_enc))
                    support = Support(indices_BK, len(W_enc))
            else:
                pre_BK, indices_BK = positive(c_BD, W_enc, b_enc)
                support = Support(indices_BK, len(W_enc))
        return preactivations(u_BD, W_enc, b, pre_BK, support, b_enc).relu(), support

    def penalty(
        self, values_BK: torch.Tensor, support: Support, weights: Weights
    ) -> torch.Tensor | None:
        """Σ_j z_j ‖W_dec,j‖ of each row."""
        lengths_N1 = torch.linalg.vector_norm(weights.W_dec, dim=1, keepdim=True)
        return bag(values_BK, lengths_N1, support)[:, 0]


def positive(
    c_BD: torch.Tensor, W_enc_ND: torch.Tensor, b_enc_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pre-activations above 0 of each row, exactly, block by block of rows.

    Args:
        c_BD: (B, D) rows u − b.
        W_enc_ND: (N, D) encoder directions, same dtype.
        b_enc_N: (N,) what is added; None for nothing.

    Returns:
        What `listed` gives.
    """
    block = _block_rows(len(W_enc_ND), c_BD.element_size())
    blocks = (
        _product(c_BD[start : start + block], W_enc_ND, b_enc_N)
        for start in range(0, len(c_BD), block)
    )
    return listed(blocks, len(W_enc_ND))


def listed(blocks: Iterable[torch.Tensor], num_latents: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries above 0 of rows × latents, as lists of one length.

    Args:
        blocks: (b, N) each, of which only one is alive at a time; at least one.
        num_latents: N.

    Returns:
        (B, K) values and (B, K) int64 indices, each once a row, ascending where values are above 0;
        K is the largest number of them in a row, at least 1, and the other values are 0.
    """
    counts, entries, latents = [], [], []
    for pre_BN in blocks:
        above = pre_BN > 0
        counts.append(above.sum(dim=1))
        entries.append(pre_BN[above])
        latents.append(above.nonzero()[:, 1])
    count_B, value_E, latent_E = (torch.cat(parts) for parts in (counts, entries, latents))
    num_rows = len(count_B)
    most = max(1, int(count_B.amax())) if num_rows else 1
    turn_K = torch.arange(most, device=count_B.device)
    used_BK = turn_K < count_B[:, None]
    values_BK = value_E.new_zeros(num_rows, most)
    values_BK[used_BK] = value_E
    # Unused places hold no latent yet: above all, so that the lists ascend.
    indices_BK = torch.full_like(used_BK, num_latents + most, dtype=torch.int64)
    indices_BK[used_BK] = latent_E
    # Latents that are not in an ascending list a: below a_i there are a_i − i of them, so the j-th
    # one is j plus the number of i with a_i − i ≤ j.
    unlisted_BK = (turn_K - count_B[:, None]).clamp_(min=0)
    skipped_BK = torch.searchsorted(indices_BK - turn_K, unlisted_BK, right=True)
    return values_BK, torch.where(used_BK, indices_BK, unlisted_BK + skipped_BK)


def _product(
    c_BD: torch.Tensor, W_enc_ND: torch.Tensor, b_enc_N: torch.Tensor | None
) -> torch.Tensor:
    if b_enc_N is None:
        return c_BD @ W_enc_ND.T
    return torch.addmm(b_enc_N, c_BD, W_enc_ND.T)


def _block_rows(num_latents: int, element_size: int) -> int:
    return max(1, BLOCK_BYTES // (element_size * num_latents))
