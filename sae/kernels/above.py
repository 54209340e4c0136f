"""Latents above a threshold, z = a · [a > θ] with a = ReLU(W_enc (u − b) + b_enc).

θ is one number, one a row (that of its layer) or one a latent; without one it is 0. Source:
Rajamanoharan et al. (2024), arXiv 2407.14435, with θ of each latent; ReLU is the case θ = 0.

Shape suffixes: B rows, D channels, N latents, K latents a row, E entries of all rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from mlsae.sae.kernels.functions import preactivations, selected
from mlsae.sae.kernels.listed import listed
from mlsae.sae.kernels.select import BLOCK_BYTES
from mlsae.sae.kernels.sparse import FullSupport, Support

_DENSE = 8
"""Dense products pay where some row uses more than one in this many latents."""


def above(
    u_BD: torch.Tensor,
    W_enc_ND: torch.Tensor,
    b_D: torch.Tensor,
    b_enc_N: torch.Tensor | None = None,
    threshold: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Support]:
    """z = a · [a > θ], with gradients for rows, encoder and biases; θ has none.

    Args:
        u_BD: (B, D) normalised rows.
        W_enc_ND: (N, D) encoder directions, same dtype.
        b_D: (D,) vector that is subtracted from rows.
        b_enc_N: (N,) encoder bias; None for none.
        threshold: θ, (), (B, 1) or (N,), compared in its own dtype if that is wider; None for
            0, as which a θ below 0 counts.

    Returns:
        (B, K) values and their places. K is the most latents that any row uses, at least 1; rows
        with fewer are filled up with latents that are 0. A single block of rows in which latents
        are many has every latent at each row instead.
    """
    least = W_enc_ND.new_zeros(()) if threshold is None else threshold.clamp(min=0)
    pre_BK, support = reached(u_BD, W_enc_ND, b_D, b_enc_N, least)
    return preactivations(u_BD, W_enc_ND, b_D, pre_BK, support, b_enc_N).relu(), support


def reached(
    u_BD: torch.Tensor,
    W_enc_ND: torch.Tensor,
    b_D: torch.Tensor,
    b_enc_N: torch.Tensor | None,
    threshold: torch.Tensor,
) -> tuple[torch.Tensor, Support]:
    """Pre-activations above a threshold of any sign, and their places, without gradients.

    Args as for `above`.

    Returns:
        (B, K) pre-activations, −∞ where they are not above the threshold, and places as for
        `above`.
    """
    c_BD = u_BD.detach() - b_D.detach()
    if threshold.ndim == 2:
        # A channel of the rows holds θ, so that a `vmap` takes it along with them.
        c_BD = torch.cat([c_BD, threshold.detach()], dim=1)
        pre_BK, indices_BK = selected(_choose_by_row, c_BD, W_enc_ND, b_enc_N)
    else:
        pre_BK, indices_BK = selected(_choose, c_BD, W_enc_ND, b_enc_N, threshold)
    num_latents = len(W_enc_ND)
    if indices_BK.shape[1] == num_latents:
        return pre_BK, FullSupport(len(u_BD), num_latents, u_BD.device)
    return pre_BK, Support(indices_BK, num_latents)


class Found(NamedTuple):
    """Entries of rows × latents, ascending by row and then by latent, without gradients."""

    values: torch.Tensor
    """(E,)"""
    rows: torch.Tensor
    """(E,) int64."""
    latents: torch.Tensor
    """(E,) int64."""


def entries_above(
    c_BD: torch.Tensor,
    W_enc_ND: torch.Tensor,
    b_enc_N: torch.Tensor | None,
    threshold: torch.Tensor,
) -> Found:
    """Pre-activations above a threshold of any sign, row after row.

    Args:
        c_BD: (B, D) rows u − b.
        W_enc_ND: (N, D) encoder directions.
        b_enc_N: (N,) encoder bias; None for none.
        threshold: (), (B, 1) or (N,).
    """
    values, rows, latents = [], [], []
    start = 0
    for pre_BN, above_BN in _blocks(c_BD, W_enc_ND, b_enc_N, threshold):
        row, latent = above_BN.nonzero(as_tuple=True)
        values.append(pre_BN[row, latent])
        rows.append(row + start)
        latents.append(latent)
        start += len(pre_BN)
    return Found(torch.cat(values), torch.cat(rows), torch.cat(latents))


def of_rows(threshold_L: torch.Tensor, at: torch.Tensor | int) -> torch.Tensor:
    """θ of rows by their layers, (B, 1), or of one layer, ().

    Args:
        threshold_L: (L,) θ of each layer.
        at: indices of layers, (B,) or one.
    """
    found = threshold_L[at]
    return found[:, None] if found.ndim else found


def block_rows(num_latents: int, element_size: int) -> int:
    """Rows that make one block of rows × latents.

    Args:
        num_latents: N.
        element_size: bytes per value.
    """
    return max(1, BLOCK_BYTES // (element_size * num_latents))


def _choose_by_row(
    rows_BE: torch.Tensor, W_enc_ND: torch.Tensor, b_enc_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    c_BD, threshold_B1 = rows_BE[:, :-1].to(W_enc_ND.dtype), rows_BE[:, -1:]
    return _choose(c_BD, W_enc_ND, b_enc_N, threshold_B1)


def _choose(
    c_BD: torch.Tensor,
    W_enc_ND: torch.Tensor,
    b_enc_N: torch.Tensor | None,
    threshold: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations and their places; with K = N, each latent at its place."""
    num_latents = len(W_enc_ND)
    blocks = _blocks(c_BD, W_enc_ND, b_enc_N, threshold)
    if len(c_BD) > block_rows(num_latents, c_BD.element_size()):
        pre_BK, indices_BK = listed(blocks, num_latents, -torch.inf)
        if indices_BK.shape[1] < num_latents:
            return pre_BK, indices_BK
        pre_BN = torch.empty_like(pre_BK).scatter_(1, indices_BK, pre_BK)
    else:
        pre_BN, above_BN = next(blocks)
        most = int(above_BN.sum(dim=1).amax()) if len(c_BD) else 0
        if most * _DENSE <= num_latents:
            return listed([(pre_BN, above_BN)], num_latents, -torch.inf)
        pre_BN = pre_BN.where(above_BN, -torch.inf)
    return pre_BN, torch.arange(num_latents, device=c_BD.device).expand(pre_BN.shape)


def _blocks(
    c_BD: torch.Tensor,
    W_enc_ND: torch.Tensor,
    b_enc_N: torch.Tensor | None,
    threshold: torch.Tensor,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pre-activations of one block of rows after another, and True for those above θ."""
    block = block_rows(len(W_enc_ND), c_BD.element_size())
    for start in range(0, max(1, len(c_BD)), block):
        rows = slice(start, start + block)
        pre_BN = product(c_BD[rows], W_enc_ND, b_enc_N)
        yield pre_BN, pre_BN > (threshold[rows] if threshold.ndim == 2 else threshold)


def product(
    c_BD: torch.Tensor, W_enc_ND: torch.Tensor, b_enc_N: torch.Tensor | None
) -> torch.Tensor:
    """(B, N) pre-activations of (B, D) rows u − b; (N,) encoder bias, None for none."""
    if b_enc_N is None:
        return c_BD @ W_enc_ND.T
    return torch.addmm(b_enc_N, c_BD, W_enc_ND.T)
