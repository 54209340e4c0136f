"""Moments of a shard's rows on the CPU, between two forward passes.

What `mlsae.harvest.compute.device_moments` sums on a GPU, arranged for caches: all layers of a few
rows of one group at a time, by threads that each take every n-th of such pieces and compute alone.
A team of threads that share every operation waits after each for its slowest member, and operations
on a piece are as short as that wait. Sums are of rows about a centre near their mean, kept for a
whole shard, so that nothing cancels (Chan, Golub and LeVeque 1983, equation 1.7); float32 within a
piece, float64 between pieces.

Shape suffixes: L layers, N rows of a piece, D channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.harvest.compute.codecs import Codecs, Key, Parts
from mlsae.store.format.moments import STANDARDIZE_EPS, GroupMoments

PIECE_VALUES = 3 << 17
"""Values of a piece, all layers of a site: 1.3 ns each. In pieces of a quarter, with tables that
nearly fit into a core's own cache, it is 1.7 ns, for the interpreter weighs more."""
LEAST_ROWS = 16
"""Of a piece, however wide: what is done once a piece and column must not outweigh its rows."""
MOST_THREADS = 4
"""More would only wait for the interpreter's lock."""

Piece = tuple[int, npt.NDArray[np.int64]]
"""A group, and indices of rows of it."""


class HostMoments:
    """Moments by group of every site and layer, of the rows added since the last `take`.

    The same to the last bit at equal `num_threads`.

    Args:
        codecs: how the rows of each site and layer are held.
        sites: of the store.
        layers: of the store, ascending.
        d_model: channels.
        num_threads: at most so many are used.
    """

    def __init__(
        self,
        codecs: Codecs,
        sites: Sequence[str],
        layers: Sequence[int],
        d_model: int,
        num_threads: int,
    ) -> None:
        self._sites, self._layers, self._d_model = tuple(sites), tuple(layers), d_model
        self._shares = [
            _Share(codecs, self._sites, self._layers, d_model)
            for _ in range(max(1, min(num_threads, MOST_THREADS)))
        ]
        self._pool = ThreadPoolExecutor(len(self._shares), thread_name_prefix="moments")

    def add(self, group_N: npt.NDArray[np.int8], stored: Mapping[Key, Parts]) -> dict[Key, Tensor]:
        """Add a batch.

        Args:
            group_N: index into `mlsae.store.format.moments.GROUPS` of each row.
            stored: (site, layer) → rows as they will be stored.

        Returns:
            For each key the largest magnitude, a scalar; not finite where a value is not.
        """
        pieces = self._pieces(group_N)
        num_shares = len(self._shares)
        with each_alone():
            underway = [
                self._pool.submit(share.add, pieces[place::num_shares], stored)
                for place, share in enumerate(self._shares)
            ]
            largest_SL = torch.stack([future.result() for future in underway]).amax(dim=0)
        return {
            (site, layer): largest
            for site, largest_L in zip(self._sites, largest_SL, strict=True)
            for layer, largest in zip(self._layers, largest_L, strict=True)
        }

    def take(self) -> dict[str, GroupMoments]:
        """The moments so far; the next batch begins anew."""
        moments = {site: GroupMoments(self._layers, self._d_model) for site in self._sites}
        for share in self._shares:
            share.give_to(moments)
        return moments

    def _pieces(self, group_N: npt.NDArray[np.int8]) -> list[Piece]:
        most_rows = max(LEAST_ROWS, PIECE_VALUES // (self._d_model * len(self._layers)))
        pieces = []
        for group in np.unique(group_N).tolist():
            rows = np.flatnonzero(group_N == group)
            pieces += [(group, rows[i : i + most_rows]) for i in range(0, len(rows), most_rows)]
        return pieces


@dataclass
class _Sums:
    """Of one site and group; u is the standardised row."""

    centre: Tensor
    """(2, L, 1, D) float32; the mean of the first rows of x and of u."""
    columns: Tensor
    """(4, L, D) float64; Σ (x − centre) and Σ (x − centre)², then the same of u."""
    norm: Tensor
    """(L,) Σ ‖x‖₂."""
    cross: Tensor
    """(L,) Σ ⟨x − centre, the same of the layer above⟩; the topmost layer's is 0."""
    max_abs: Tensor
    """(L,) float32."""
    count: int = 0


class _Share:
    """What one thread has summed."""

    def __init__(
        self, codecs: Codecs, sites: tuple[str, ...], layers: tuple[int, ...], d_model: int
    ) -> None:
        self._codecs = codecs
        self._sites, self._layers, self._d_model = sites, layers, d_model
        self._sums: dict[tuple[str, int], _Sums] = {}
        self._tables = torch.empty(3, 0)
        self._columns_4LD = torch.empty(4, len(layers), d_model)

    @torch.inference_mode()
    def add(self, pieces: Sequence[Piece], stored: Mapping[Key, Parts]) -> Tensor:
        """(sites, L) largest magnitudes."""
        largest_SL = torch.zeros(len(self._sites), len(self._layers))
        held = {
            site: [(self._codecs[site, layer], stored[site, layer]) for layer in self._layers]
            for site in self._sites
        }
        for group, rows in pieces:
            picked = _picker(rows)
            x_LND, *scratch = self._tables_for(len(rows))
            for site, largest_L in zip(self._sites, largest_SL, strict=True):
                for (codec, parts), x_ND in zip(held[site], x_LND, strict=True):
                    codec.decode_into(tuple(map(picked, parts)), x_ND)
                magnitude_L = torch.maximum(x_LND.amax(dim=(1, 2)), -x_LND.amin(dim=(1, 2)))
                torch.maximum(largest_L, magnitude_L, out=largest_L)
                sums = self._sums_of(site, group)
                torch.maximum(sums.max_abs, magnitude_L, out=sums.max_abs)
                self._add_piece(sums, x_LND, *scratch)
        return largest_SL

    def give_to(self, moments: Mapping[str, GroupMoments]) -> None:
        """Merge what there is into a site's moments, and begin anew."""
        for (site, group), sums in sorted(self._sums.items()):
            first_2LD, second_2LD = sums.columns[::2], sums.columns[1::2]
            offset_2LD = first_2LD / sums.count
            products_L = (first_2LD[0, :-1] * offset_2LD[0, 1:]).sum(dim=1)
            moments[site].merge_group(
                group,
                sums.count,
                mean_2LD=(sums.centre[:, :, 0] + offset_2LD).numpy(),
                m2_2LD=(second_2LD - first_2LD * offset_2LD).clamp(min=0).numpy(),
                norm_sum_L=sums.norm.numpy(),
                max_abs_L=sums.max_abs.double().numpy(),
                cross_L=(sums.cross[:-1] - products_L).numpy(),
            )
        self._sums = {}

    def _add_piece(self, sums: _Sums, x_LND: Tensor, y_LND: Tensor, scratch_LND: Tensor) -> None:
        """Add rows, which are overwritten."""
        is_first = not sums.count
        sums.count += x_LND.shape[1]
        centre_L1D, u_centre_L1D = sums.centre
        if is_first:
            torch.mean(x_LND, dim=1, keepdim=True, out=centre_L1D)
        torch.sub(x_LND, centre_L1D, out=y_LND)
        torch.mul(y_LND[:-1], y_LND[1:], out=scratch_LND[:-1])
        sums.cross[:-1] += scratch_LND[:-1].sum(dim=(1, 2))
        self._sum_columns(0, y_LND, scratch_LND)
        mean_LN1 = x_LND.mean(dim=2, keepdim=True)
        x_LND.sub_(mean_LN1)
        deviation_LN1 = torch.linalg.vector_norm(x_LND, dim=2, keepdim=True)
        sums.norm += torch.hypot(deviation_LN1, mean_LN1 * self._d_model**0.5).sum(dim=(1, 2))
        std_LN1 = deviation_LN1 / max(self._d_model - 1, 1) ** 0.5
        scale_LN1 = (std_LN1 + STANDARDIZE_EPS).reciprocal()
        if is_first:
            torch.mul(x_LND, scale_LN1, out=y_LND)
            torch.mean(y_LND, dim=1, keepdim=True, out=u_centre_L1D)
        u_LND = torch.addcmul(-u_centre_L1D, x_LND, scale_LN1, out=x_LND)
        self._sum_columns(2, u_LND, scratch_LND)
        sums.columns += self._columns_4LD

    def _sum_columns(self, place: int, y_LND: Tensor, scratch_LND: Tensor) -> None:
        torch.sum(y_LND, dim=1, out=self._columns_4LD[place])
        torch.square(y_LND, out=scratch_LND)
        torch.sum(scratch_LND, dim=1, out=self._columns_4LD[place + 1])

    def _sums_of(self, site: str, group: int) -> _Sums:
        if (site, group) not in self._sums:
            num_layers, wide = len(self._layers), torch.float64
            self._sums[site, group] = _Sums(
                torch.zeros(2, num_layers, 1, self._d_model),
                torch.zeros(4, num_layers, self._d_model, dtype=wide),
                torch.zeros(num_layers, dtype=wide),
                torch.zeros(num_layers, dtype=wide),
                torch.zeros(num_layers),
            )
        return self._sums[site, group]

    def _tables_for(self, num_rows: int) -> Tensor:
        """(3, L, N, D) float32 to be written over: fresh memory would cost as much as the sums."""
        size = len(self._layers) * num_rows * self._d_model
        if self._tables.shape[1] < size:
            self._tables = torch.empty(3, size)
        return self._tables[:, :size].view(3, len(self._layers), num_rows, self._d_model)


def _picker(rows: npt.NDArray[np.int64]) -> Callable[[Tensor], Tensor]:
    """Takes some rows; a view where they follow one another."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1:
        return itemgetter(slice(first, last + 1))
    index = torch.from_numpy(rows)
    return lambda part: part.index_select(0, index)


@contextmanager
def each_alone() -> Iterator[None]:
    """Operations of any thread use that thread alone: others have work of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
