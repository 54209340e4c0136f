"""Latents of rows that share a budget: the largest pre-activations of a group, above 0, exactly.

A group of n rows keeps its k · n largest entries of rows × latents. Larger values come first; of
equal ones those of an earlier row, then of an earlier latent. Blocks of rows share one buffer; what
outlives a block are the entries above a guess of the least that is kept, a quantile of a sample.
Where too few are above it, the group is done again from 0 on, so any guess gives the same entries.

Where bfloat16 is fast, the product is in it and only candidates are computed again, as in
`select_screened`: entries that cannot reach the least that is kept, by the bound of `Screen`, are
left out, so the result is that of float32.

Shape suffixes: B rows, D channels, N latents, E entries, ascending by row and then by latent.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from mlsae.base.machine.processor import has_fast_bfloat16
from mlsae.sae.kernels.largest import supports
from mlsae.sae.kernels.screen import Screen
from mlsae.sae.kernels.select import BLOCK_BYTES, LEAST_ROWS, LEAST_WEIGHTS
from mlsae.sae.kernels.sparse import Entries

_SAMPLE = 1 << 15
"""Entries of a group's first block from which its least is guessed."""
_DEVIATIONS = 3
"""Deviations of the count in such a sample by which a guess is on the safe side."""
_MOST = 4
"""Entries held for each that is kept; of more, those that cannot be kept are dropped."""
_ROWS = 32
"""Rows looked through at once: few enough to stay in the cache of a core."""


class Kept(NamedTuple):
    """Entries of rows × latents, without gradients."""

    values: torch.Tensor
    """(E,)"""
    rows: torch.Tensor
    """(E,) int64."""
    latents: torch.Tensor
    """(E,) int64."""

    def at(self, chosen: torch.Tensor) -> "Kept":
        """The entries that a mask or indices (E,) choose."""
        return Kept(*(part[chosen] for part in self))

    def largest(self, count: int) -> "Kept":
        """The `count` largest, in their order; of equal values the first."""
        if len(self.values) <= count:
            return self
        least = torch.topk(self.values, count, sorted=False).values.amin()
        chosen = self.values > least
        equal = (self.values == least).nonzero()[:, 0]
        chosen[equal[: count - int(chosen.sum())]] = True
        return self.at(chosen)


Look = Callable[["_Group", slice, torch.Tensor, ThreadPoolExecutor], None]
"""Takes a group, rows of it, and their products (b, N), which are good until it returns."""


def select_by_group(
    c_BD: torch.Tensor, W_enc_ND: torch.Tensor, k: int, sizes: Sequence[int]
) -> Kept:
    """The k · n largest entries above 0 of W_enc c for each group of n rows.

    Args:
        c_BD: (B, D) centred rows u − b, group after group.
        W_enc_ND: (N, D) encoder directions, same dtype.
        k: entries for each row, in the mean over its group.
        sizes: rows of each group, B in all.
    """
    pays = (
        c_BD.dtype == torch.float32
        and c_BD.device.type == "cpu"
        and len(c_BD) >= LEAST_ROWS
        and W_enc_ND.numel() >= LEAST_WEIGHTS
        and has_fast_bfloat16()
    )
    if not len(c_BD):
        nothing = torch.zeros(0, dtype=torch.int64, device=c_BD.device)
        return Kept(c_BD.new_zeros(0), nothing, nothing)
    with torch.no_grad():
        return (screened if pays else plain)(c_BD, W_enc_ND, k, sizes)


def plain(c_BD: torch.Tensor, W_enc_ND: torch.Tensor, k: int, sizes: Sequence[int]) -> Kept:
    """`select_by_group` by products in the given dtype."""
    groups = _groups(sizes, k)

    def look(group: _Group, rows: slice, pre_BN: torch.Tensor, pool: ThreadPoolExecutor) -> None:
        group.guess(pre_BN, k)
        row_E, latent_E = _above(pre_BN, group.least, pool)
        group.add(Kept(pre_BN[row_E, latent_E], row_E + rows.start, latent_E))

    _look_through(c_BD, W_enc_ND, groups, look)
    for group in groups:
        if group.lacks_some:
            group.start_over()
            _look_through(c_BD, W_enc_ND, [group], look)
    return _joined([group.kept() for group in groups])


def screened(c_BD: torch.Tensor, W_enc_ND: torch.Tensor, k: int, sizes: Sequence[int]) -> Kept:
    """`select_by_group` by way of bfloat16, exactly, for float32 rows and directions on a CPU."""
    screen, c16_BD = Screen(W_enc_ND), c_BD.to(torch.bfloat16)
    groups = _groups(sizes, k)

    def look(group: _Group, rows: slice, pre_BN: torch.Tensor, pool: ThreadPoolExecutor) -> None:
        group.guess(pre_BN, k)
        if not group.guessed:
            group.least = math.inf
            return
        seen_B = screen.seen(c_BD[rows], c16_BD[rows], group.guessed)
        # No entry that is left out here is above `least`.
        most_B = screen.most(c_BD[rows], c16_BD[rows], seen_B)
        group.least = max(group.least, float(most_B.amax()))
        if group.least == math.inf or group.num_held > 2 * _MOST * group.budget:
            group.least = math.inf
            return
        row_E, latent_E = _above(pre_BN, seen_B, pool)
        group.held.append(Kept(latent_E, row_E + rows.start, latent_E))

    _look_through(c16_BD, screen.W_ND, groups, look)
    found = []
    for group in groups:
        if group.least < math.inf and group.held:
            _, row_E, latent_E = _joined(group.held)
            places = Entries.of_rows(row_E - group.start, latent_E, group.size, len(W_enc_ND))
            values = places.sampled_product(c_BD[group.start : group.stop], W_enc_ND)
            group.held = [Kept(values, row_E, latent_E).at(values > group.least)]
        if group.least == math.inf or group.lacks_some:
            of_group = slice(group.start, group.stop)
            values, row_E, latent_E = plain(c_BD[of_group], W_enc_ND, k, [group.size])
            found.append(Kept(values, row_E + group.start, latent_E))
        else:
            found.append(group.kept())
    return _joined(found)


class _Group:
    """A group's rows, and the entries that may be kept.

    Args:
        start: first row.
        size: number of rows.
        k: entries for each, in the mean.
    """

    def __init__(self, start: int, size: int, k: int) -> None:
        self.start, self.size, self.stop = start, size, start + size
        self.budget = k * size
        self.guessed: float | None = None
        """Guess of the least that is kept."""
        self.least = 0.0
        """Entries above are held."""
        self.held: list[Kept] = []

    @property
    def num_held(self) -> int:
        return sum(len(part.values) for part in self.held)

    @property
    def lacks_some(self) -> bool:
        return self.num_held < self.budget and self.least > 0

    def start_over(self) -> None:
        self.guessed, self.least, self.held = 0.0, 0.0, []

    def guess(self, pre_BN: torch.Tensor, k: int) -> None:
        """Guess from the first products, unless there is a guess."""
        if self.guessed is not None:
            return
        num_latents = pre_BN.shape[1]
        stride = max(1, pre_BN.numel() // _SAMPLE)
        while math.gcd(stride, num_latents) > 1:  # Every latent, not the same few of each row.
            stride += 1
        sample = pre_BN.reshape(-1)[::stride].float()
        expected = len(sample) * k / num_latents
        count = math.ceil(expected + _DEVIATIONS * math.sqrt(expected))
        self.guessed = 0.0
        if count < len(sample):
            least = torch.topk(sample, count, sorted=False).values.amin()
            self.guessed = max(0.0, float(least))
        self.least = self.guessed

    def add(self, entries: Kept) -> None:
        """Hold entries above the least, which come after those that are held."""
        self.held.append(entries)
        if self.num_held > _MOST * self.budget:
            self.held = [self.kept()]
            self.least = max(self.least, float(self.held[0].values.amin()))

    def kept(self) -> Kept:
        return _joined(self.held).largest(self.budget)


def _groups(sizes: Sequence[int], k: int) -> list[_Group]:
    ends = itertools.accumulate(sizes)
    return [_Group(end - size, size, k) for end, size in zip(ends, sizes, strict=True) if size]


def _joined(parts: Sequence[Kept]) -> Kept:
    return Kept(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _look_through(
    c_BD: torch.Tensor, W_ND: torch.Tensor, groups: Sequence[_Group], look: Look
) -> None:
    """Show the products of groups that follow each other, block by block in one buffer."""
    block = max(1, BLOCK_BYTES // (c_BD.element_size() * len(W_ND)))
    start, stop = groups[0].start, groups[-1].stop
    buffer = c_BD.new_empty(min(block, stop - start), len(W_ND))
    with ThreadPoolExecutor(torch.get_num_threads(), "mlsae-budget") as pool:
        while start < stop:
            end = min(start + block, stop)
            pre_BN = torch.mm(c_BD[start:end], W_ND.T, out=buffer[: end - start])
            for group in groups:
                rows = slice(max(start, group.start), min(end, group.stop))
                if rows.start < rows.stop:
                    look(group, rows, pre_BN[rows.start - start : rows.stop - start], pool)
            start = end


def _above(
    pre_BN: torch.Tensor, least: torch.Tensor | float, pool: ThreadPoolExecutor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and latents of the entries above a number, or above one for each row (B,)."""
    if not isinstance(least, torch.Tensor):
        least = pre_BN.new_full((len(pre_BN),), least)
    if not supports(pre_BN):
        row_E, latent_E = (pre_BN > least[:, None]).nonzero(as_tuple=True)
        return row_E, latent_E
    if pre_BN.dtype == torch.bfloat16:
        # Bits above those of a number that is not negative are those of numbers above it.
        pre_BN, least = pre_BN.view(torch.int16), least.view(torch.int16)
    values, bounds = pre_BN.numpy(), least[:, None].numpy()
    shares = [slice(i, i + _ROWS) for i in range(0, len(values), _ROWS)]
    # One thread would only pass the interpreter's lock to and fro with this one.
    run: Callable[..., Any] = pool.map if torch.get_num_threads() > 1 else map
    found = run(
        lambda rows: _true(values[rows] > bounds[rows]) + rows.start * values.shape[1], shares
    )
    flat_E = np.concatenate([*found])
    row_E, latent_E = (torch.from_numpy(part) for part in np.divmod(flat_E, values.shape[1]))
    return row_E, latent_E


def _true(mask: Any) -> Any:
    """Flat places of the few that are true, eight at a time."""
    flat = mask.reshape(-1)
    if flat.size % 8:
        return np.flatnonzero(flat)
    words = np.flatnonzero(flat.view(np.uint64))
    word, place = np.nonzero(flat.reshape(-1, 8)[words])
    return words[word] * 8 + place
