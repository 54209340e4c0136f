"""Cosines of decoder directions with one another and with embeddings, block by block.

Shapes: M = num_latents, D = d_in, V embedding rows, C cosine bins, S distance bins.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.base.errors import ResourceError
from mlsae.base.machine.resources import available_memory
from mlsae.base.units import counted, format_bytes

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

BLOCK = 2048
"""Directions of a block: of each two blocks, all cosines are in memory at once. Where there is too
little memory for that, blocks are smaller."""

_SMALLEST_BLOCK = 64
"""Below this, the time would be the calls'."""

_PAIR_BYTES = 32
"""Most memory for a pair of blocks."""

COSINE_BINS = 200
"""Equal cosine bins from −1 to 1."""

DISTANCE_BINS = 4
"""Equal bins, a layer each, for the distance between two latents' mean layers."""


@dataclass(frozen=True, eq=False)
class Nearest:
    """Each direction's nearest other one; NaN and −1 if there is none."""

    cosines: Float
    """(M,) largest cosine."""

    indices: Int
    """(M,) index of the nearest."""


@dataclass(frozen=True, eq=False)
class DecoderPairs:
    """Summary of a decoder's pairwise cosines."""

    nearest: Nearest
    """Nearest other direction."""

    mmcs: float | None
    """Mean over latents of the largest cosine with another; None where there is no other."""

    mmcs_published: float
    """Mean largest cosine with earlier latents, 0 at least (tim-lawson/mlsae, figures/mmcs.py)."""

    counts: Int
    """(S + 1, C) pairs by distance between their mean layers, and by cosine. The last distance
    holds the pairs with a latent that has no mean layer."""


def check_memory(decoder_MD: Tensor) -> None:
    """See, before hours of work, that all pairwise cosines can be had at all.

    Raises:
        ResourceError: too little memory even for blocks with one row.
    """
    _block_size(decoder_MD)


def block_size(num_latents: int, d_in: int, available: int) -> int:
    """Directions per block for which `decoder_pairs` fits into memory.

    Args:
        num_latents: M.
        d_in: D.
        available: bytes that may be taken.

    Returns:
        BLOCK, or that halved until it fits.

    Raises:
        ResourceError: not even small blocks fit; with the numbers.
    """
    of_latents = num_latents * (4 * d_in + 16)
    block = BLOCK
    while (needed := of_latents + min(block, num_latents) ** 2 * _PAIR_BYTES) > available:
        if block <= _SMALLEST_BLOCK:
            raise ResourceError(
                f"not enough memory for the cosines of "
                f"{counted(num_latents, 'decoder direction')}: "
                f"even {block} by {block} at a time they need {format_bytes(needed)}, "
                f"{format_bytes(available)} available; free some memory or use a larger machine"
            )
        block //= 2
    return block


def _block_size(decoder_MD: Tensor) -> int:
    device = decoder_MD.device
    on_device = device.type == "cuda"
    available = int(torch.cuda.mem_get_info(device)[0]) if on_device else available_memory()
    num_latents, d_in = decoder_MD.shape
    return block_size(num_latents, d_in, available)


def unit_rows(rows_MD: Tensor) -> Tensor:
    """Rows scaled to length 1, float32; a zero row stays."""
    return torch.nn.functional.normalize(rows_MD.float(), dim=1)


@torch.no_grad()
def decoder_pairs(
    decoder_MD: Tensor, layer_means_M: Float, span: int, progress: Callable[[int], object]
) -> DecoderPairs:
    """Look at every pair of directions once, in memory for the pairs between two blocks.

    The mean largest cosine (MMCS) is that of Sharkey et al. (2022), a dictionary compared with
    itself.

    Args:
        decoder_MD: the directions, at any length.
        layer_means_M: mean layer by latent; NaN for one that has none.
        span: the last layer's id minus the first's.
        progress: told the number of pairs in each finished block.

    Raises:
        ResourceError: too little memory even for blocks with one row.
    """
    block = _block_size(decoder_MD)
    unit_MD, device = unit_rows(decoder_MD), decoder_MD.device
    num_latents = len(unit_MD)
    means_M = torch.from_numpy(layer_means_M).float().to(device)
    largest_M = torch.full((num_latents,), -torch.inf, device=device)
    partner_M = torch.full((num_latents,), -1, device=device)
    earlier_M = torch.zeros(num_latents, device=device)
    num_distances = max(1, span * DISTANCE_BINS)
    shape = (num_distances + 1, COSINE_BINS)
    counts = torch.zeros(shape[0] * shape[1], dtype=torch.int64, device=device)

    def keep(own: slice, cosines: Tensor, other: slice, dim: int) -> None:
        found, at = cosines.max(dim)
        better = found > largest_M[own]
        largest_M[own] = torch.where(better, found, largest_M[own])
        partner_M[own] = torch.where(better, at + other.start, partner_M[own])

    for i, j in _block_pairs(num_latents, block):
        cosines = unit_MD[i] @ unit_MD[j].T
        bins = _bins(cosines, means_M[i], means_M[j], num_distances)
        if i == j:
            later = torch.ones_like(cosines, dtype=torch.bool).triu(1)
            bins = bins[later]
            # Each pair in both orders, none with itself.
            keep(i, cosines.clone().fill_diagonal_(-torch.inf), j, 1)
            cosines = cosines.masked_fill(~later, -torch.inf)
        else:
            keep(i, cosines, j, 1)
            keep(j, cosines, i, 0)
        earlier_M[j] = torch.maximum(earlier_M[j], cosines.amax(0))
        counts += torch.bincount(bins.flatten(), minlength=len(counts))
        progress(bins.numel())
    return DecoderPairs(
        nearest=_nearest(largest_M, partner_M),
        mmcs=float(largest_M.double().mean()) if num_latents > 1 else None,
        mmcs_published=float(earlier_M.double().mean()),
        counts=counts.view(shape).cpu().numpy(),
    )


def _block_pairs(num_latents: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Every two blocks once, each with itself first."""
    blocks = [slice(n, min(n + size, num_latents)) for n in range(0, num_latents, size)]
    for n, block in enumerate(blocks):
        for other in blocks[n:]:
            yield block, other


def _bins(cosines: Tensor, means_I: Tensor, means_J: Tensor, num_distances: int) -> Tensor:
    """Bin for each pair: distance between the mean layers, then cosine."""
    # Whole numbers as float32 until the end, in place: this takes longer than the product.
    by_cosine = (cosines + 1).mul_(COSINE_BINS / 2).floor_().clamp_(0, COSINE_BINS - 1)
    by_distance = (means_I[:, None] - means_J).abs_().mul_(DISTANCE_BINS).floor_()
    by_distance.clamp_(max=num_distances - 1).nan_to_num_(nan=num_distances)
    return by_cosine.add_(by_distance, alpha=COSINE_BINS).int()


@torch.no_grad()
def nearest_rows(decoder_MD: Tensor, rows_VD: Tensor) -> Nearest:
    """The embedding row with which each direction has its largest cosine.

    Raises:
        ResourceError: too little memory even for blocks with one row.
    """
    block = _block_size(decoder_MD)
    unit_MD = unit_rows(decoder_MD)
    largest_M = torch.full((len(unit_MD),), -torch.inf, device=unit_MD.device)
    at_M = torch.full((len(unit_MD),), -1, device=unit_MD.device)
    for first in range(0, len(rows_VD), block):
        rows = unit_rows(rows_VD[first : first + block].to(unit_MD.device))
        for start in range(0, len(unit_MD), block):
            own = slice(start, start + block)
            found, at = (unit_MD[own] @ rows.T).max(1)
            better = found > largest_M[own]
            largest_M[own] = torch.where(better, found, largest_M[own])
            at_M[own] = torch.where(better, at + first, at_M[own])
    return _nearest(largest_M, at_M)


def _nearest(cosines_M: Tensor, indices_M: Tensor) -> Nearest:
    cosines = cosines_M.double().cpu().numpy()
    cosines[~np.isfinite(cosines)] = np.nan
    return Nearest(cosines, indices_M.cpu().numpy())
