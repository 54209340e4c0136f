"""Several layers' rows, cut into slices, in each epoch's order."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.units import format_bytes
from mlsae.store import AnyStore
from mlsae.train.data.rows import TrainingRows
from mlsae.train.data.sampler import NO_ROW, Order, slice_rows

SLICE_BYTES = 64 << 10
"""Bytes per slice unless a window is asked for: less is slow to read, more is memory."""
_LEAST_AHEAD = 4
"""Batches by which reading may be ahead, at least."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several layers' rows, cut into slices, and the order in which epochs visit them."""

    store: AnyStore
    site: str
    layers: tuple[int, ...]
    batch_rows: int
    seed: int
    rows: TrainingRows
    slice_rows: int
    """Rows per slice."""
    counts: npt.NDArray[Any]
    """(num_slices,) rows in each slice that are trained on."""
    num_rows: int
    """Rows at one layer that are trained on in an epoch."""

    @classmethod
    def plan(
        cls,
        store: AnyStore,
        site: str,
        layers: tuple[int, ...],
        *,
        batch_rows: int,
        seed: int,
        skip_positions: int,
        validation: npt.NDArray[np.int64],
        window: int | None = None,
    ) -> "Mixture":
        """Cut a store into slices.

        Args:
            store: the store.
            site: one among its sites.
            layers: some among its layers.
            batch_rows: rows in a batch, over layers and ranks; all rows where they are fewer.
            seed: the order's seed.
            skip_positions: first positions in a sequence that are left out.
            validation: ascending indices of sequences held out.
            window: bytes for rows in memory, over ranks, by way of the slice; None for slices of
                64 KiB.

        Raises:
            InputError: the window holds less than a row a slot, the batch is smaller than the
                number of layers, or no row is left.
        """
        rows = TrainingRows(store, skip_positions, validation)
        num_rows = rows.count()
        if num_rows == 0:
            raise InputError(NO_ROW)
        # A batch is at most an epoch, so that no memory is asked for rows that are not there.
        batch_rows = min(batch_rows, num_rows * len(layers))
        row_bytes = store.row_bytes
        max_rows = max(1, SLICE_BYTES // row_bytes)
        if window is not None:
            buffers = _num_buffers(len(layers) * -(-batch_rows // len(layers)))
            max_rows = window // (buffers * row_bytes)
            if max_rows < 1:
                raise InputError(
                    f"--window must hold at least one row for each row of a batch, "
                    f"{format_bytes(buffers * row_bytes)}, got {format_bytes(window)}; raise it or "
                    f"lower --batch-size"
                )
        size = slice_rows(num_rows, batch_rows, len(layers), max_rows)
        return cls(
            store=store,
            site=site,
            layers=layers,
            batch_rows=batch_rows,
            seed=seed,
            rows=rows,
            slice_rows=size,
            counts=rows.slice_counts(size),
            num_rows=num_rows,
        )

    def order(self, epoch: int) -> Order:
        """An epoch's order."""
        return Order(
            self.counts,
            num_layers=len(self.layers),
            batch_rows=self.batch_rows,
            seed=self.seed,
            epoch=epoch,
        )

    @property
    def epoch_rows(self) -> int:
        """Rows in an epoch, over layers."""
        return self.num_rows * len(self.layers)

    @property
    def epoch_steps(self) -> int:
        """Batches in an epoch; the last may be short."""
        return -(-self.epoch_rows // self.batch_rows)

    @property
    def num_slots(self) -> int:
        """Slots at one layer."""
        return -(-self.batch_rows // len(self.layers))

    def rank_slots(self, rank: int, world_size: int) -> int:
        """One rank's slots, over layers: the most rows that it gets from a batch."""
        # The rank owns slots j with (j + layer) mod world_size = rank: see `owned_slots`.
        first = [(rank - layer) % world_size for layer in range(len(self.layers))]
        return sum(max(0, -(-(self.num_slots - start) // world_size)) for start in first)

    def rank_rows(self, rank: int, world_size: int) -> int:
        """Most rows that a rank gets from a batch, at least 1."""
        return max(1, min(self.batch_rows, self.rank_slots(rank, world_size)))

    @property
    def num_batches(self) -> int:
        """Batches that a rank has in memory: those that a slice's rows are spread over, and more,
        so that reading can be ahead."""
        round_rows = self.num_slots * len(self.layers)
        return -(-(self.slice_rows - 1) * round_rows // self.batch_rows) + 1 + self.num_ahead

    @property
    def num_ahead(self) -> int:
        """Batches by which reading may be ahead."""
        return max(_LEAST_AHEAD, self.slice_rows // 6)

    def window_bytes(self, rank: int, world_size: int) -> int:
        """Bytes of batches that a rank has in memory."""
        rows = self.num_batches * self.rank_rows(rank, world_size)
        return (rows + 1) * self.store.row_bytes


def _num_buffers(num_slots: int) -> int:
    """Buffers for so many slots: an eighth more, so that reading can be ahead."""
    return num_slots + max(1, num_slots // 8)
