"""Some entries of rows × latents, as lists of one length.

Shape suffixes: B rows, N latents, K entries of a row, E entries.
"""

from collections.abc import Iterable

import torch


def listed(
    blocks: Iterable[tuple[torch.Tensor, torch.Tensor]], num_latents: int, rest: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The wanted entries of rows × latents, as lists of one length.

    Args:
        blocks: (b, N) values and (b, N) bool, True for those wanted, of which only one pair is
            alive at a time; at least one.
        num_latents: N.
        rest: value in places without a wanted entry.

    Returns:
        (B, K) values and (B, K) int64 indices, each once a row, the wanted ones first and
        ascending; K is the largest number of them in a row, at least 1.
    """
    counts, entries, latents = [], [], []
    for values_BN, wanted_BN in blocks:
        counts.append(wanted_BN.sum(dim=1))
        entries.append(values_BN[wanted_BN])
        latents.append(wanted_BN.nonzero()[:, 1])
    count_B, value_E, latent_E = (torch.cat(parts) for parts in (counts, entries, latents))
    num_rows = len(count_B)
    most = max(1, int(count_B.amax())) if num_rows else 1
    turn_K = torch.arange(most, device=count_B.device)
    used_BK = turn_K < count_B[:, None]
    values_BK = value_E.new_full((num_rows, most), rest)
    values_BK[used_BK] = value_E
    # Unused places hold no latent yet: above all, so that the lists ascend.
    indices_BK = torch.full_like(used_BK, num_latents + most, dtype=torch.int64)
    indices_BK[used_BK] = latent_E
    # Latents that are not in an ascending list a: below a_i there are a_i − i of them, so the j-th
    # one is j plus the number of i with a_i − i ≤ j.
    unlisted_BK = (turn_K - count_B[:, None]).clamp_(min=0)
    skipped_BK = torch.searchsorted(indices_BK - turn_K, unlisted_BK, right=True)
    return values_BK, torch.where(used_BK, indices_BK, unlisted_BK + skipped_BK)
