"""Rows of a store that are trained on."""

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from mlsae.store import AnyStore

_BLOCK_ROWS = 1 << 20


class TrainingRows:
    """The rows that are eligible and not held out for validation; computed when asked for.

    Args:
        store: read for the tokens of its rows and their flags alone.
        skip_positions: first positions of a sequence that are left out.
        validation: (n,) ascending indices of the sequences held out.
    """

    def __init__(
        self, store: AnyStore, skip_positions: int, validation: npt.NDArray[np.int64]
    ) -> None:
        self._store = store
        self._skip_positions = skip_positions
        self._validation = validation
        self._every_token = store.rows_per_sequence == store.context_length

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """(stop − start,) whether each row is trained on."""
        eligible = self._store.eligible(self._skip_positions, start, stop)
        self._hold_out(eligible, start)
        return eligible

    def places(
        self, slices: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], rows_per_slice: int
    ) -> npt.NDArray[np.int64]:
        """Where the rows of slices that are trained on lie in them.

        The mask is computed from row numbers; flags are read for those slices alone whose
        counts say that there are more gaps.

        Args:
            slices: (n,) indices of slices.
            counts: (n,) rows of each that are trained on.
            rows_per_slice: rows of a slice.

        Returns:
            (n, rows_per_slice): of each slice, its trained rows counted from its first, ascending;
            a slice's row means nothing from its count on.
        """
        num_rows, every_token = self._store.num_rows, self._every_token
        mask = self._unless_flagged(slices * rows_per_slice, rows_per_slice)
        for i in np.flatnonzero(mask.sum(axis=1, dtype=np.int32) != counts).tolist():
            start = int(slices[i]) * rows_per_slice
            stop = min(start + rows_per_slice, num_rows)
            if every_token:
                mask[i, : stop - start] &= self._store.row_flags(start, stop) == 0
            else:
                mask[i, : stop - start] = self.mask(start, stop)
        trained = np.flatnonzero(mask)
        nth = (np.cumsum(counts) - counts)[:, None] + np.arange(rows_per_slice)
        # Beyond a slice's count, and the last one's end, are those that mean nothing.
        places = trained.take(nth, mode="clip")
        places -= np.arange(len(slices))[:, None] * rows_per_slice
        return places

    def _unless_flagged(
        self, starts: npt.NDArray[np.int64], num_rows: int
    ) -> npt.NDArray[np.bool_]:
        """(n, num_rows) mask of rows from each start on, if none has a flag.

        Where a store keeps some positions alone, which ones does not follow from a row's number:
        all count as if they were beyond the first.
        """
        length = self._store.rows_per_sequence
        skipped = self._skip_positions if self._every_token else 0
        of_rows = np.arange(length + num_rows - 1) % length >= skipped
        trained = sliding_window_view(of_rows, num_rows)[starts % length]
        beyond = np.flatnonzero(starts + num_rows > self._store.num_rows)
        for i in beyond.tolist():
            trained[i, self._store.num_rows - int(starts[i]) :] = False
        ends = np.stack([starts // length, (starts + num_rows - 1) // length + 1])
        held_out = np.searchsorted(self._validation, ends)
        for i in np.flatnonzero(held_out[0] < held_out[1]).tolist():
            self._hold_out(trained[i], int(starts[i]))
        return trained

    def _hold_out(self, mask: npt.NDArray[np.bool_], start: int) -> None:
        """Clear the mask of rows from `start` on where their sequences are held out."""
        length = self._store.rows_per_sequence
        inside = np.searchsorted(
            self._validation, [start // length, -(-(start + len(mask)) // length)]
        )
        for sequence in self._validation[inside[0] : inside[1]].tolist():
            first = sequence * length - start
            mask[max(first, 0) : max(first + length, 0)] = False

    def count(self) -> int:
        """Rows of a layer that are trained on."""
        return sum(
            int(self.mask(start, min(start + _BLOCK_ROWS, self._store.num_rows)).sum())
            for start in range(0, self._store.num_rows, _BLOCK_ROWS)
        )

    def slice_counts(self, rows_per_slice: int) -> npt.NDArray[Any]:
        """(num_slices,) rows of each slice that are trained on, in the smallest integer type."""
        num_rows = self._store.num_rows
        counts = np.empty(-(-num_rows // rows_per_slice), np.min_scalar_type(rows_per_slice))
        block = max(1, _BLOCK_ROWS // rows_per_slice)
        for first in range(0, len(counts), block):
            start = first * rows_per_slice
            mask = self.mask(start, min(start + block * rows_per_slice, num_rows))
            edges = np.arange(0, len(mask), rows_per_slice)
            counts[first : first + len(edges)] = np.add.reduceat(mask, edges, dtype=np.int64)
        return counts
