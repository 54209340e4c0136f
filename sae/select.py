"""Which latents a row uses: the k largest pre-activations, found block by block of rows.

Shape suffixes: B rows, D channels, N latents, K selected latents.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from mlsae.sae.largest import largest, supports
from mlsae.sae.sparse import Support

BLOCK_BYTES = 16 << 20
"""Pre-activations alive at once: a block of rows × latents."""
_GROUP = 16
"""Latents in a group of the two-stage selection: measured best of 8, 16, 32, 64 on CPUs."""


def select(c_BD: torch.Tensor, W_enc_ND: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of W_enc c for each row, exactly; among equal values any choice.

    No (B, N) tensor is made: rows are taken in blocks that share one buffer.

    Args:
        c_BD: (B, D) centred rows u − b.
        W_enc_ND: (N, D) encoder directions, same dtype.
        k: latents to select, at most N.

    Returns:
        (B, K) pre-activations, unordered, and (B, K) int64 latent indices. Neither carries a
        gradient.
    """
    num_rows, num_latents = c_BD.shape[0], W_enc_ND.shape[0]
    values_BK = c_BD.new_empty(num_rows, k)
    indices_BK = torch.empty(num_rows, k, dtype=torch.int64, device=c_BD.device)
    block = max(1, BLOCK_BYTES // (c_BD.element_size() * num_latents))
    with torch.no_grad(), ThreadPoolExecutor(torch.get_num_threads(), "mlsae-select") as pool:
        buffer = c_BD.new_empty(min(block, num_rows), num_latents)
        for start in range(0, num_rows, block):
            rows = slice(start, min(start + block, num_rows))
            pre = torch.mm(c_BD[rows], W_enc_ND.T, out=buffer[: rows.stop - start])
            if supports(pre):
                largest(pre, k, pool, indices_BK[rows])
                torch.gather(pre, 1, indices_BK[rows], out=values_BK[rows])
            else:
                values_BK[rows], indices_BK[rows] = top_k(pre, k)
    return values_BK, indices_BK


def select_mixed(
    c_BD: torch.Tensor, W_enc_ND: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select` with a bfloat16 product: more candidates than k, re-scored in the given dtype.

    bfloat16 keeps 8 bits, so it may misjudge pre-activations that are nearly equal: a quarter as
    many candidates again as k, and at least 8 more, make that rare. The values are exact. Among
    pre-activations that are not above 0 the choice is any, because a ReLU follows.
    """
    candidates = min(k + max(8, k // 4), W_enc_ND.shape[0])
    _, indices = select(c_BD.to(torch.bfloat16), W_enc_ND.to(torch.bfloat16), candidates)
    with torch.no_grad():
        scores = Support(indices, W_enc_ND.shape[0]).sampled_product(c_BD, W_enc_ND)
        values, chosen = torch.topk(scores, k, dim=1, sorted=False)
    return values, indices.gather(1, chosen)


def top_k(pre_BN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row and their indices, unordered; among equal values any choice.

    A row's k largest lie in the k groups with the largest maxima: any element outside is at most
    the maximum of each of those k groups. So the costly selection sees a sixteenth of the row
    twice, instead of all of it.
    """
    num_rows, num_latents = pre_BN.shape
    num_groups = num_latents // _GROUP
    if num_latents % _GROUP or num_groups < 4 * k:
        values, indices = torch.topk(pre_BN, k, dim=1, sorted=False)
        return values, indices
    # A group's members lie num_groups apart, so that its maximum is taken over whole vectors.
    grouped = pre_BN.view(num_rows, _GROUP, num_groups)
    groups_BK = torch.topk(grouped.amax(dim=1), k, dim=1, sorted=False).indices
    members = torch.arange(0, num_latents, num_groups, device=pre_BN.device)
    candidates = (groups_BK[:, None, :] + members[None, :, None]).view(num_rows, _GROUP * k)
    values, chosen = torch.topk(pre_BN.gather(1, candidates), k, dim=1, sorted=False)
    return values, candidates.gather(1, chosen)
