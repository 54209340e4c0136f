"""The order in which an epoch visits rows: layers mixed evenly, neighbours kept apart.

A pure function of (each slice's eligible rows, settings, seed, epoch). Nothing that grows with
the store is held but the one count a slice, which all layers share; permutations are computed.

A *slice* is a run of consecutive rows, the reading unit. A layer's eligible rows, taken in a
permuted order of its slices, are cut into `num_slots` equal runs, the *slots*: as many as a batch
holds rows at a layer. The layer's order takes the first row in every slot, then the second in every
slot, and so on, so that neighbours in the order come from different slots. Items of the epoch
alternate between layers; a batch is the next `batch_rows` items. Hence:

- every batch has equal rows at every layer, give or take one, and every eligible (layer, row)
  comes once an epoch;
- a batch has at most one row from a slice: a slot is at one slice at a time, and the two parts into
  which a cut between slots divides a slice are visited at opposite ends of the epoch;
- what is in memory is one slice for each slot, whatever the store's size, and slots move on to
  their next slices at different times, so that reading is steady.

Slot j at layer l belongs to *lane* (j + l) mod lanes, and rank r of w has lanes r, r + w, …: any w
that divides the lanes gives the same batches.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.units import counted
from mlsae.train.data.permutation import NUM_ROUNDS, derive_keys, mix, permute

Int64 = npt.NDArray[np.int64]

NUM_LANES = 16
_GOLDEN = (5**0.5 - 1) / 2
NO_ROW = (
    "no row is left to train on: every row has a flag, is skipped by --skip-positions or is held "
    "out by --validation-fraction"
)
"""Message of an epoch without rows."""
_BLOCK = 1 << 12
"""Slices walked at once when a position is looked up."""


class SliceParts(NamedTuple):
    """Slices, or parts at the ends of slots; arrays with one length."""

    layer: Int64
    """Index into the run's layers."""
    slice: Int64
    """Slice index: rows slice · slice_rows and on."""
    first: Int64
    """The part starts at this one among the slice's eligible rows, counted from 0."""
    num_rows: Int64
    """Eligible rows in the part, at least 1."""


def slice_rows(num_eligible: int, batch_rows: int, num_layers: int, max_rows: int) -> int:
    """Rows per slice: nearly `max_rows`, and so few that a slot runs over several slices.

    Among sizes from 0.8 of the largest up, the one that leaves a slot a fraction of about 0.618
    slices: then cuts between slots fall at scattered places in slices, and slots do not all need
    their next slice at once.
    """
    slot = num_eligible / -(-batch_rows // num_layers)
    largest = max(1, min(max_rows, math.floor(slot / (1 + _GOLDEN))))
    sizes = np.arange(math.ceil(0.8 * largest), largest + 1)
    return int(sizes[np.abs(slot / sizes % 1 - _GOLDEN).argmin()])


def check_world_size(world_size: int, num_lanes: int = NUM_LANES) -> None:
    """Refuse a number of ranks that does not divide the lanes.

    Raises:
        InputError: listing those that do.
    """
    if num_lanes % world_size:
        fitting = ", ".join(str(w) for w in range(1, num_lanes + 1) if num_lanes % w == 0)
        raise InputError(
            f"{world_size} ranks cannot share {counted(num_lanes, 'lane')} evenly: start {fitting} "
            "ranks"
        )


def lanes_of(layer: Int64, slot: Int64, num_lanes: int = NUM_LANES) -> Int64:
    """The lane of each (layer, slot); the arguments broadcast."""
    lanes: Int64 = (slot + layer) % num_lanes
    return lanes


def owned_slots(
    layer: Int64, slot: Int64, rank: int, world_size: int, num_lanes: int = NUM_LANES
) -> npt.NDArray[np.bool_]:
    """True for each (layer, slot) in one of this rank's lanes; the arguments broadcast."""
    owned: npt.NDArray[np.bool_] = lanes_of(layer, slot, num_lanes) % world_size == rank
    return owned


class Order:
    """The order in one epoch.

    Args:
        counts: (num_slices,) eligible rows by slice, any unsigned integer type; kept.
        num_layers: layers in the run.
        batch_rows: rows in a batch, over all layers and ranks.
        seed: the run's seed.
        epoch: from 0; every epoch has its own permutations.
        num_lanes: shares into which the order can be cut.

    Raises:
        InputError: the batch has fewer rows than there are layers, or no row is eligible.
    """

    def __init__(
        self,
        counts: npt.NDArray[Any],
        *,
        num_layers: int,
        batch_rows: int,
        seed: int,
        epoch: int,
        num_lanes: int = NUM_LANES,
    ) -> None:
        if batch_rows < num_layers:
            raise InputError(
                f"a batch must hold at least one row of each layer: got "
                f"{counted(batch_rows, 'row')} for {counted(num_layers, 'layer')}; "
                "raise --batch-size"
            )
        self.counts = counts
        self.num_layers = num_layers
        self.batch_rows = batch_rows
        self.num_lanes = num_lanes
        self.num_rows = int(counts.sum(dtype=np.int64))
        """Eligible rows at a layer."""
        if self.num_rows == 0:
            raise InputError(NO_ROW)
        self.num_slots = -(-batch_rows // num_layers)
        self.num_steps = -(-self.num_rows * num_layers // batch_rows)
        rounds, rest = divmod(self.num_rows, self.num_slots)
        slots = np.arange(self.num_slots + 1)
        self.starts: Int64 = slots * rounds + np.minimum(slots, rest)
        """(num_slots + 1,) eligible rows before each slot in a layer's permuted order."""
        self._keys = np.stack(
            [derive_keys(NUM_ROUNDS, "slices", seed, epoch, i) for i in range(num_layers)]
        )
        self._row_keys = derive_keys(num_layers, "rows", seed, epoch)

    def part_order(self, parts: SliceParts) -> Int64:
        """Eligible rows in parts, ordered by their visits, counted within their slices.

        The order is by a keyed hash of the row, so it is the same whenever it is asked for.

        Returns:
            (n, width) with the longest part's width; a part's row means nothing from its
            number of rows on.
        """
        width = int(parts.num_rows.max(initial=0))
        row = parts.first[:, None] + np.arange(width)
        key = mix(parts.slice.astype(np.uint64) + self._row_keys[parts.layer])
        rank = mix(key[:, None] + row.astype(np.uint64))
        if int(parts.num_rows.min(initial=width)) < width:
            beyond = np.arange(width) >= parts.num_rows[:, None]
            np.copyto(rank, np.iinfo(np.uint64).max, where=beyond)
        # Distinct rows have distinct ranks, so every way of sorting gives the same order.
        order = np.argsort(rank, axis=1)
        order += parts.first[:, None]
        return order

    def slices(self, layer: Int64, position: Int64) -> Int64:
        """The slices at these positions in their layers' permuted orders."""
        return permute(position, len(self.counts), self._keys[layer])

    def locate(self, layer: int, offsets: Int64) -> tuple[Int64, Int64]:
        """Where in a layer's permuted order given eligible rows lie.

        Args:
            layer: index into the layers.
            offsets: (n,) ascending, eligible rows counted along the permuted order.

        Returns:
            (n,) position of the slice that holds each, (n,) eligible rows before that slice.
        """
        position, before = np.empty_like(offsets), np.empty_like(offsets)
        total = done = 0
        for start in range(0, len(self.counts), _BLOCK):
            at = np.arange(start, min(start + _BLOCK, len(self.counts)))
            counts = self.counts[self.slices(np.full(len(at), layer), at)].astype(np.int64)
            ends = total + np.cumsum(counts)
            inside = done + int(np.searchsorted(offsets[done:], ends[-1]))
            found = np.searchsorted(ends, offsets[done:inside], side="right")
            position[done:inside] = start + found
            before[done:inside] = ends[found] - counts[found]
            total, done = int(ends[-1]), inside
        return position, before
