"""An order walked step by step: the slice parts that a rank needs, and from when to when.

Each slot gives one row a *round* at each layer. A rank's *places* are its slots at all layers in
the order in which a round visits them, so its share of a step is a run of places, which may go on
in the next round; rows stand in that order in their batch. Parts are found many steps at a time:
arrays over places and parts cost little for each row, while a step alone would cost more than
reading its rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlsae.train.data.sampler import (
    Int64,
    Order,
    SliceParts,
    check_world_size,
    lanes_of,
    owned_slots,
)

_BLOCK_ROWS = 1 << 18
"""Rows in a rank's share of the steps that are walked at once, or nearly."""


@dataclass(frozen=True)
class StepBlock:
    """Neighbouring steps, and the parts that are first needed in them."""

    steps: range
    """Steps within the epoch, from 0."""
    parts: SliceParts
    """Parts, ordered by the steps that need them first."""
    opens: Int64
    """(n,) step in the walk that needs the part first: ascending."""
    closes: Int64
    """(n,) step that needs the part last."""
    place: Int64
    """(n,) the place whose rows the part holds."""
    round: Int64
    """(n,) the round that visits the part's first row; the next row has the next round. Rounds
    before the walk began are passed over."""


class Walk:
    """A rank's steps, from any step to the epoch's end; iterates over blocks.

    Args:
        order: the epoch's order.
        start: step to begin with; it opens every part that is under way there.
        rank: this process's rank.
        world_size: number of ranks.

    Raises:
        InputError: the number of ranks does not divide the lanes.
    """

    def __init__(self, order: Order, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        check_world_size(world_size, order.num_lanes)
        self.order = order
        self.start = start
        items = np.arange(order.num_layers * order.num_slots)
        slot, layer = np.divmod(items, order.num_layers)
        owned = owned_slots(layer, slot, rank, world_size, order.num_lanes)
        self.layer: Int64 = layer[owned]
        """(num_places,) each place's index into the layers."""
        self._layers = np.concatenate([self.layer, self.layer])
        lanes = lanes_of(layer, slot, order.num_lanes)[owned]
        self._lanes = np.concatenate([lanes, lanes])
        self._items = items[owned]
        self._round_items = len(items)
        self._num_items = order.num_rows * order.num_layers
        self._owned_before = np.concatenate([[0], np.cumsum(owned)])
        self._cursors = _Cursors(order, self.layer, slot[owned], self._first_round(start))

    def __iter__(self) -> Iterator[StepBlock]:
        share = self.order.batch_rows * len(self.layer) // self._round_items
        num_steps = max(1, _BLOCK_ROWS // max(1, share))
        for start in range(self.start, self.order.num_steps, num_steps):
            yield self._block(range(start, min(start + num_steps, self.order.num_steps)))

    def batch_rows(self, step: int) -> int:
        """Rows in a step's batch, over all ranks."""
        return min(self.order.batch_rows, self._num_items - step * self.order.batch_rows)

    def rows_before(self, step: Int64) -> Int64:
        """(n,) the rank's rows in the epoch before each step."""
        item = np.minimum(step * self.order.batch_rows, self._num_items)
        round_, rest = np.divmod(item, self._round_items)
        rows: Int64 = round_ * len(self.layer) + self._owned_before[rest]
        return rows

    def layers(self, start: int, stop: int) -> Int64:
        """(stop − start,) layers at the rank's rows start … stop − 1, a round or less."""
        place = start % max(1, len(self.layer))
        return self._layers[place : place + stop - start]

    def lanes(self, start: int, stop: int) -> Int64:
        """(stop − start,) lanes at the same rows."""
        place = start % max(1, len(self.layer))
        return self._lanes[place : place + stop - start]

    def visits(self, block: StepBlock, width: int) -> tuple[Int64, Int64]:
        """Times at which the parts' rows are visited.

        Args:
            block: block from the walk.
            width: visits to each part; those beyond its number of rows mean nothing.

        Returns:
            (n, width) step at each visit, (n, width) the rank's rows in the epoch before it.
        """
        nth = np.arange(width)
        item = block.round * self._round_items + self._items[block.place]
        row = block.round * len(self.layer) + block.place
        step = (item[:, None] + nth * self._round_items) // self.order.batch_rows
        return step, row[:, None] + nth * len(self.layer)

    def _block(self, steps: range) -> StepBlock:
        place, parts, first_round = self._cursors.open_before(self._first_round(steps.stop))
        opened = self._step_of(place, first_round)
        # Sorted, parts come in one order however many were opened before the walk began.
        by_opening = np.lexsort((first_round, place, opened))
        place, first_round, opened = place[by_opening], first_round[by_opening], opened[by_opening]
        parts = SliceParts(*(column[by_opening] for column in parts))
        return StepBlock(
            steps=steps,
            parts=parts,
            opens=np.maximum(opened, self.start),
            closes=self._step_of(place, first_round + parts.num_rows - 1),
            place=place,
            round=first_round,
        )

    def _step_of(self, place: Int64, round_: Int64) -> Int64:
        """(n,) the step that needs each place's row in a round."""
        return (round_ * self._round_items + self._items[place]) // self.order.batch_rows

    def _first_round(self, step: int) -> Int64:
        """(num_places,) the first round in which a place is visited at `step` or later."""
        return -((self._items - step * self.order.batch_rows) // self._round_items)


class _Cursors:
    """Each place's position in its layer's permuted order: at its next slice.

    Args:
        order: the epoch's order.
        layer: (num_places,)
        slot: (num_places,)
        first_round: (num_places,) rounds that each place has behind it.
    """

    def __init__(self, order: Order, layer: Int64, slot: Int64, first_round: Int64) -> None:
        self._order, self._layer = order, layer
        self._start, self._stop = order.starts[slot], order.starts[slot + 1]
        self._position, self._before = np.empty_like(slot), np.empty_like(slot)
        offsets = np.minimum(self._start + first_round, order.num_rows - 1)
        for number in range(order.num_layers):
            at = layer == number
            self._position[at], self._before[at] = order.locate(number, offsets[at])
        self._next_round = np.maximum(self._before - self._start, 0)
        self._next_round[self._start + first_round >= self._stop] = np.iinfo(np.int64).max

    def open_before(self, limit: Int64) -> tuple[Int64, SliceParts, Int64]:
        """Open, for each place, every part that it needs in a round before its limit.

        Returns:
            (n,) each part's place, the parts, and (n,) the round at its first row.
        """
        limit = np.minimum(limit, self._stop - self._start)
        opened = [(np.zeros(0, np.int64),) * 6]
        at = np.flatnonzero(self._next_round < limit)
        while len(at):
            layer, before, start = self._layer[at], self._before[at], self._start[at]
            slices = self._order.slices(layer, self._position[at])
            count = self._order.counts[slices].astype(np.int64)
            first = np.maximum(start - before, 0)
            num_rows = np.minimum(self._stop[at] - before, count) - first
            # Slices without an eligible row are passed over.
            some = num_rows > 0
            found = at, self._next_round[at], layer, slices, first, num_rows
            opened.append(tuple(column[some] for column in found))
            self._position[at] += 1
            self._before[at] += count
            self._next_round[at] = np.maximum(before + count - start, 0)
            at = at[self._next_round[at] < limit[at]]
        place, next_round, *parts = (np.concatenate(column) for column in zip(*opened, strict=True))
        return place, SliceParts(*parts), next_round
