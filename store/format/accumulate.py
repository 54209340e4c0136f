"""Moments of stored rows, fast: float32 in blocks that fit a core's cache, float64 between blocks.

Inside a block, sums are taken about the block's own mean in two passes, the second corrected for
the rounding of the first (Chan, Golub and LeVeque 1983, equation 1.7), so that nothing cancels:
rows that are all alike have a second moment of exactly 0. No BLAS: its threads would get into each
other's way here, and its sums depend on their number.

Shape suffixes: L layers, N rows in a block, D channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.store.format.encoding import SiteCodec, Stored
from mlsae.store.format.moments import STANDARDIZE_EPS, GroupMoments

BLOCK_ELEMENTS = 1 << 17
"""Values in a block: four tables of so many float32 lie in 2 MiB."""
SAFE_MAGNITUDE = 1e15
"""Beyond it a block is summed in float64, because squares would leave float32's range."""
SMALL_MAGNITUDE = 1e-10
"""Below it a block is summed in float64 too, unless it is all 0, because squares would vanish."""

LARGEST_FLOAT16 = 65504.0
MAX_MEAN_TO_STD = 16.0
"""A row whose mean is larger, in standard deviations, has its mean taken off twice."""

Array = npt.NDArray[Any]
GroupRows = tuple[int, npt.NDArray[np.int64]]
"""A group, and indices of some of its rows."""


def blocks_of(group_N: npt.NDArray[np.int8], most_rows: int) -> list[GroupRows]:
    """Blocks with at most `most_rows` rows, group after group."""
    blocks = []
    for group in np.unique(group_N).tolist():
        rows = np.flatnonzero(group_N == group)
        blocks += [(group, rows[i : i + most_rows]) for i in range(0, len(rows), most_rows)]
    return blocks


class Accumulator(GroupMoments):
    """One site's moments that grow by blocks of stored rows; for one thread at a time."""

    def __init__(self, layers: tuple[int, ...], d_model: int, codec: SiteCodec) -> None:
        super().__init__(layers, d_model)
        self._codec = codec
        self._most_rows = max(8, BLOCK_ELEMENTS // d_model)
        self._picked = [np.empty((self._most_rows, part.width), part.dtype) for part in codec.parts]
        self._sums: dict[type, _Sums] = {}

    def add(self, group_N: npt.NDArray[np.int8], stored_L: Sequence[Stored]) -> bool:
        """Add some rows at all layers.

        Args:
            group_N: each row's index into `mlsae.store.format.moments.GROUPS`.
            stored_L: for each layer the N stored rows.

        Returns:
            False as soon as a value is not finite; the moments are useless then.
        """
        return all(
            self._add_block(group, rows, stored_L, np.float32)
            for group, rows in blocks_of(group_N, self._most_rows)
        )

    def _add_block(
        self,
        group: int,
        rows: npt.NDArray[np.int64],
        stored_L: Sequence[Stored],
        dtype: type[np.float32 | np.float64],
    ) -> bool:
        if dtype not in self._sums:
            self._sums[dtype] = _Sums(self._most_rows, len(self.layers), self.d_model, dtype)
        sums = self._sums[dtype]
        picked = tuple(buffer[: len(rows)] for buffer in self._picked)
        for index, stored in enumerate(stored_L):
            for part, out in zip(stored, picked, strict=True):
                np.take(part, rows, axis=0, out=out, mode="clip")
            max_abs = sums.load(picked, index, self._codec)
            if not np.isfinite(max_abs):
                return False
            is_safe = max_abs == 0 or SMALL_MAGNITUDE <= max_abs <= SAFE_MAGNITUDE
            if not is_safe and dtype is np.float32:
                return self._add_block(group, rows, stored_L, np.float64)
            sums.add_layer(index)
        sums.give_to(self, group)
        return True


class _Sums:
    """One block: tables to be used again, and the layers' sums so far."""

    def __init__(
        self, size: int, num_layers: int, d_model: int, dtype: type[np.float32 | np.float64]
    ) -> None:
        self._x_ND = np.empty((size, d_model), dtype)
        # Centred rows at this layer and at the one before, for their cross moment.
        self._centred_2ND = np.empty((2, size, d_model), dtype)
        self._squares_ND = np.empty((size, d_model), dtype)
        self._centre_2LD = np.empty((2, num_layers, d_model), dtype)
        self._first_2LD = np.empty((2, num_layers, d_model), dtype)
        self._second_2LD = np.empty((2, num_layers, d_model), dtype)
        self._norm_sum_L = np.zeros(num_layers)
        self._max_abs_L = np.zeros(num_layers)
        self._cross_L = np.zeros(max(num_layers - 1, 0))
        self._num_rows = 0
        self._max_abs = 0.0

    def load(self, stored: Stored, index: int, codec: SiteCodec) -> float:
        """Decode a layer's rows; their largest magnitude, not finite if a value is not."""
        self._num_rows = len(stored[0])
        x_ND = self._x_ND[: self._num_rows]
        codec.decode_finite_into(stored, index, x_ND)
        self._max_abs = max(float(x_ND.max()), -float(x_ND.min()))
        if codec.encoding == "float16" and self._max_abs > LARGEST_FLOAT16:
            self._max_abs = np.inf
        return self._max_abs

    def add_layer(self, index: int) -> None:
        """Sums at the layer that was loaded last; it is standardised in its place."""
        x_ND = self._x_ND[: self._num_rows]
        centred_ND = self._centred_2ND[index % 2, : self._num_rows]
        self._sum_columns(0, index, x_ND, centred_ND)
        if index:
            # Row by row first: one long float32 sum would lose digits.
            before_ND = self._centred_2ND[1 - index % 2, : self._num_rows]
            products_N = np.einsum("nd,nd->n", before_ND, centred_ND)
            self._cross_L[index - 1] = products_N.sum(dtype=np.float64)
        self._max_abs_L[index] = self._max_abs
        self._norm_sum_L[index] = self._standardize(x_ND)
        self._sum_columns(1, index, x_ND, x_ND)

    def give_to(self, moments: GroupMoments, group: int) -> None:
        """Merge the block, all its layers, into a group."""
        moments.merge_sums(
            group,
            self._num_rows,
            centre_2LD=self._centre_2LD,
            first_2LD=self._first_2LD,
            second_2LD=self._second_2LD,
            norm_sum_L=self._norm_sum_L,
            max_abs_L=self._max_abs_L,
            cross_L=self._cross_L,
        )

    def _sum_columns(self, kind: int, index: int, x_ND: Array, centred_ND: Array) -> None:
        """By channel: a centre near the mean, and the sums of x − centre and its square."""
        centre_D = self._centre_2LD[kind, index]
        np.add.reduce(x_ND, axis=0, out=centre_D)
        centre_D /= self._num_rows
        np.subtract(x_ND, centre_D, out=centred_ND)
        np.add.reduce(centred_ND, axis=0, out=self._first_2LD[kind, index])
        squares_ND = np.square(centred_ND, out=self._squares_ND[: self._num_rows])
        self._second_2LD[kind, index] = _sum_pairwise(squares_ND)

    def _standardize(self, x_ND: Array) -> float:
        """Turn rows x into u in place; the sum of ‖x‖₂ over rows."""
        num_channels = x_ND.shape[1]
        mean_N = np.einsum("nd->n", x_ND) / num_channels
        x_ND -= mean_N[:, None]
        mean_square_N = np.einsum("nd,nd->n", x_ND, x_ND) / num_channels
        if (np.square(mean_N) > MAX_MEAN_TO_STD**2 * mean_square_N).any():
            # Channels nearly alike: the rounding error of the row's mean would show in u.
            rest_N = np.einsum("nd->n", x_ND) / num_channels
            x_ND -= rest_N[:, None]
            mean_square_N = np.einsum("nd,nd->n", x_ND, x_ND) / num_channels
        mean_square_N = mean_square_N.astype(np.float64)
        std_N = np.sqrt(mean_square_N * (num_channels / max(num_channels - 1, 1)))
        x_ND *= (1 / (std_N + STANDARDIZE_EPS)).astype(x_ND.dtype)[:, None]
        norm_N = np.sqrt(num_channels * (mean_square_N + mean_N.astype(np.float64) ** 2))
        return float(norm_N.sum())


def _sum_pairwise(x_ND: Array) -> Array:
    """(D,) sum over the rows, which are overwritten; its error grows with log N alone."""
    num_rows = len(x_ND)
    while num_rows > 1:
        half = (num_rows + 1) // 2
        x_ND[: num_rows - half] += x_ND[half:num_rows]
        num_rows = half
    total_D: Array = x_ND[0]
    return total_D
