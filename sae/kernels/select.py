"""Latents that a row uses: the k largest pre-activations, found block by block of rows.

Shape suffixes: B rows, D channels, N latents, K selected latents.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from mlsae.base.machine.processor import has_fast_bfloat16
from mlsae.sae.kernels.largest import GROUP, largest, supports
from mlsae.sae.kernels.screen import Screen
from mlsae.sae.kernels.sparse import Support

BLOCK_BYTES = 16 << 20
"""Pre-activations alive at once: a block of rows × latents."""
_SCREENED_ROWS = 1024
"""Rows screened at once."""
LEAST_ROWS, LEAST_WEIGHTS = 256, 1 << 19
"""Rows and weights from which screening pays: rounding the weights takes as long as some rows."""


def select(c_BD: torch.Tensor, W_enc_ND: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of W_enc c for each row, exactly; among equal values any choice.

    No (B, N) tensor is made: rows are taken in blocks that share one buffer. Among pre-activations
    that are not above 0 the choice is any, because a ReLU follows.

    Args:
        c_BD: (B, D) centred rows u − b.
        W_enc_ND: (N, D) encoder directions, same dtype.
        k: latents to select, at most N.

    Returns:
        (B, K) pre-activations, unordered, and (B, K) int64 latent indices. Neither carries a
        gradient.
    """
    with torch.no_grad():
        if _screening_pays(c_BD, W_enc_ND, k):
            return select_screened(c_BD, W_enc_ND, k)
        return _select(c_BD, W_enc_ND, k)


def select_screened(
    c_BD: torch.Tensor, W_enc_ND: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select` by way of bfloat16, exactly, for float32 rows and directions on a CPU.

    The largest of a product in bfloat16 are computed again in float32. Where the k-th of them is
    at least the bound of every other latent, they hold the k largest; other rows are done in
    float32.
    """
    num_rows, num_latents = c_BD.shape[0], W_enc_ND.shape[0]
    screen, candidates = Screen(W_enc_ND), _num_candidates(k, W_enc_ND)
    values_BK = c_BD.new_empty(num_rows, k)
    indices_BK = torch.empty(num_rows, k, dtype=torch.int64)
    open_B = torch.ones(num_rows, dtype=torch.bool)
    for start in range(0, num_rows, _SCREENED_ROWS):
        rows = slice(start, start + _SCREENED_ROWS)
        c16_BD = c_BD[rows].to(torch.bfloat16)
        seen, found = _select(c16_BD, screen.W_ND, candidates)
        scores = Support(found, num_latents).sampled_product(c_BD[rows], W_enc_ND)
        values_BK[rows], chosen = torch.topk(scores, k, dim=1, sorted=False)
        indices_BK[rows] = found.gather(1, chosen)
        # Values that are not above 0 come in no order.
        others_B = screen.most(c_BD[rows], c16_BD, seen.amin(dim=1).clamp(min=0))
        open_B[rows] = ~(values_BK[rows].amin(dim=1) >= others_B)
        # Directions so much alike, or rows with so few above 0, are no better further on.
        if open_B[rows].sum() > len(c16_BD) // 2:
            break
    open_rows = open_B.nonzero().squeeze(1)
    if len(open_rows):
        values_BK[open_rows], indices_BK[open_rows] = _select(c_BD[open_rows], W_enc_ND, k)
    return values_BK, indices_BK


def _screening_pays(c_BD: torch.Tensor, W_enc_ND: torch.Tensor, k: int) -> bool:
    """True on CPUs that multiply bfloat16 faster than float32, and sum in float32."""
    return (
        c_BD.dtype == torch.float32
        and c_BD.device.type == "cpu"
        and len(c_BD) >= LEAST_ROWS
        and W_enc_ND.numel() >= LEAST_WEIGHTS
        and _num_candidates(k, W_enc_ND) * 4 * GROUP <= len(W_enc_ND)
        and has_fast_bfloat16()
    )


def _num_candidates(k: int, W_enc_ND: torch.Tensor) -> int:
    """Number of candidates of which the last is clearly below the k-th.

    Rounding errors grow with the square root of the channels, measured in the spread of a row's
    products.
    """
    per_latent = 3 if W_enc_ND.shape[1] <= 2048 else 5
    return min(max(per_latent * k, k + 16), len(W_enc_ND))


def _select(
    c_BD: torch.Tensor, W_enc_ND: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, num_latents = c_BD.shape[0], W_enc_ND.shape[0]
    values_BK = c_BD.new_empty(num_rows, k)
    indices_BK = torch.empty(num_rows, k, dtype=torch.int64, device=c_BD.device)
    block = max(1, BLOCK_BYTES // (c_BD.element_size() * num_latents))
    with ThreadPoolExecutor(torch.get_num_threads(), "mlsae-select") as pool:
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
    with torch.no_grad():
        _, indices = _select(c_BD.to(torch.bfloat16), W_enc_ND.to(torch.bfloat16), candidates)
        scores = Support(indices, W_enc_ND.shape[0]).sampled_product(c_BD, W_enc_ND)
        values, chosen = torch.topk(scores, k, dim=1, sorted=False)
    return values, indices.gather(1, chosen)


def top_k(pre_BN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row and their indices, unordered; among equal values any choice.

    A row's k largest lie in the k groups with the largest maxima: any element outside is at most
    the maximum of each of those k groups. The costly selection thus sees a sixteenth of the row
    twice instead of the whole row.
    """
    num_rows, num_latents = pre_BN.shape
    num_groups = num_latents // GROUP
    if num_latents % GROUP or num_groups < 4 * k:
        values, indices = torch.topk(pre_BN, k, dim=1, sorted=False)
        return values, indices
    # A group's members lie num_groups apart, so that its maximum is taken over whole vectors.
    grouped = pre_BN.view(num_rows, GROUP, num_groups)
    groups_BK = torch.topk(grouped.amax(dim=1), k, dim=1, sorted=False).indices
    members = torch.arange(0, num_latents, num_groups, device=pre_BN.device)
    candidates = (groups_BK[:, None, :] + members[None, :, None]).view(num_rows, GROUP * k)
    values, chosen = torch.topk(pre_BN.gather(1, candidates), k, dim=1, sorted=False)
    return values, candidates.gather(1, chosen)
