"""Random events from each quarter of a latent's range, whose end is known last of all.

Wanted in each quarter of (0, m], m a latent's largest value, are the events with the largest
scores. While m may still grow, an event is dropped once `size` others with larger scores must share
its quarter, however large m becomes. A quarter other than the lowest is an interval (a, r · a] with
r = 2, 3/2 or 4/3. If it holds a value v, it holds all values from v / √r to v, or all from v to
√r · v: an event is dropped if `size` better ones lie in each of these intervals. An event at or
below m / 4 stays in the lowest quarter, and is compared with the others that do. Scores do not
depend on values, so the number of kept events grows with the logarithm of the number of all.

Shapes: M = num_latents, E offered events, A kept ones, C candidates sorted by latent, then by
value, G latents' quarters, S events wanted in each.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlsae.analyze.examples.best import Field, nth_largest, stable_order

RANGES = 4
"""Equal parts of a latent's range, from 0 to its largest value."""

CANDIDATES = 20
"""Events kept for each one that is wanted in a quarter, about.

A comparison left 6 to 12 out of a million to forty million events at 4,096 latents."""

_LATENT_BITS = 32
"""A key is a latent, then the bits of a float32 above 0, whose order is that of the values."""

_REACH = 16
"""Neighbours in value that an event is compared with on either side, by `size`."""

_COMPARED = 2**22
"""Pairs that are compared at once."""

_NARROWER = 1 - 1e-6
"""Factor on an interval's half width, to allow for rounding."""

_SHRINKS = 0.5
"""Candidates are compared again while a comparison leaves no more than this share."""

_BINS = 24
"""Equal parts from a quarter of the largest value up to it, by which events are tested
when they come; one more is below, and one above."""


class Sample:
    """Keeps the events that may turn out best in a quarter of their latent's range.

    Args:
        num_latents: M.
        size: S.
        fields: an event's fields, by name; one is `event`, a number that orders events.
        device: device for the tensors.
    """

    def __init__(
        self, num_latents: int, size: int, fields: Mapping[str, Field], device: torch.device
    ) -> None:
        self.size = size
        self.largest = torch.zeros(num_latents, device=device)
        """(M,) float32 largest value by latent until now."""
        self._expected = CANDIDATES * size * num_latents
        # Candidates; those since the last comparison are behind, in no order.
        self._keys = torch.zeros(0, dtype=torch.int64, device=device)
        self._scores = torch.zeros(0, dtype=torch.int32, device=device)
        self._places = torch.zeros(0, dtype=torch.int64, device=device)
        self._num_compared = self._num_sorted = 0
        # As at the last comparison; by latent and bin, the score that an event there must reach.
        self._tested = self.largest.clone()
        self._thresholds = torch.zeros(num_latents * (_BINS + 2), dtype=torch.int32, device=device)
        self._free = torch.zeros(0, dtype=torch.int64, device=device)
        self._fields = {
            name: torch.zeros(0, of.width, dtype=of.dtype, device=device)
            for name, of in fields.items()
        }

    @property
    def num_candidates(self) -> int:
        """Events that are kept at present."""
        return len(self._keys)

    @property
    def edges(self) -> Tensor:
        """(RANGES − 1, M) float32 upper ends of all quarters but the last; each holds its own."""
        parts = torch.arange(1, RANGES, device=self.largest.device)[:, None] / RANGES
        return self.largest * parts

    def place(self, latents_E: Tensor, values_E: Tensor, scores_E: Tensor) -> tuple[Tensor, Tensor]:
        """Take events in; `write` must follow.

        Args:
            latents_E: each event's latent.
            values_E: values, float32 above 0.
            scores_E: scores, int32 above 0, as good as random.

        Returns:
            (A,) int64 indices of the kept ones, and (A,) int64 places for `write`.
        """
        self.largest.scatter_reduce_(0, latents_E, values_E, "amax")
        passes = scores_E >= self._thresholds[self._bins(latents_E, values_E)]
        offered = passes.nonzero()[:, 0]
        self._keys = torch.cat([self._keys, _keys(latents_E[offered], values_E[offered])])
        self._scores = torch.cat([self._scores, scores_E[offered]])
        # Below 0: not yet stored anywhere.
        self._places = torch.cat([self._places, -1 - offered])
        if len(self._keys) > max(1.5 * self._num_compared, self._expected):
            self._compare()
        new = (self._places < 0).nonzero()[:, 0]
        kept = -1 - self._places[new]
        self._places[new] = self._take_places(len(new))
        return kept, self._places[new]

    def write(self, places_A: Tensor, **fields: Tensor) -> None:
        """Set the fields of the events that `place` has just kept, (A, width) each."""
        for name, values in fields.items():
            self._fields[name][places_A] = values

    def read(self, first: int, last: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Best events in the quarters of the latents from `first` to before `last`.

        Returns:
            (G, S) bool, whether there is such an event, and (G, S, width) by field.
        """
        if self._num_sorted < len(self._keys):
            self._sort()
        bounds = torch.tensor([first, last], device=self._keys.device) << _LATENT_BITS
        start, end = torch.searchsorted(self._keys, bounds).tolist()
        latents, values = _latents_and_values(self._keys[start:end])
        scores, places = self._scores[start:end], self._places[start:end]
        group = (latents - first) * RANGES
        for edge_M in self.edges:
            group += values > edge_M[latents]
        order = stable_order(self._fields["event"][places, 0])
        order = order[stable_order(-scores[order].long())]
        order = order[stable_order(group[order])]
        group, places = group[order], places[order]
        rank = _ranks(group)
        best = rank < self.size
        group, rank, places = group[best], rank[best], places[best]
        shape = ((last - first) * RANGES, self.size)
        has = torch.zeros(shape, dtype=torch.bool, device=group.device)
        has[group, rank] = True
        fields = {}
        for name, kept in self._fields.items():
            fields[name] = kept.new_zeros(*shape, kept.shape[1])
            fields[name][group, rank] = kept[places]
        return has, fields

    @staticmethod
    def num_bytes(num_latents: int, size: int, fields: Mapping[str, Field]) -> int:
        """Memory for one, about."""
        event = sum(of.width * of.dtype.itemsize for of in fields.values())
        # Beside an event: key, score and place, and those at the last comparison.
        return num_latents * size * CANDIDATES * (32 + event)

    def _bins(self, latents_E: Tensor, values_E: Tensor) -> Tensor:
        """Each event's index into `_thresholds`, (E,) int64; ascending with the value."""
        share = values_E / self._tested[latents_E]
        width = (1 - 1 / RANGES) / _BINS
        bins = (share - 1 / RANGES).div_(width).ceil_().clamp_(0, _BINS + 1)
        return latents_E * (_BINS + 2) + bins.long()

    def _take_places(self, count: int) -> Tensor:
        """Places that hold no event, (count,) int64."""
        if (missing := count - len(self._free)) > 0:
            capacity = len(self._fields["event"])
            more = max(missing, capacity // 8)
            self._free = torch.cat(
                [self._free, torch.arange(capacity, capacity + more, device=self._free.device)]
            )
            for name, kept in self._fields.items():
                self._fields[name] = torch.cat([kept, kept.new_zeros(more, kept.shape[1])])
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _sort(self) -> None:
        latents, values = _latents_and_values(self._keys)
        order = stable_order(values.view(torch.int32).long())
        self._keep(order[stable_order(latents[order])])
        self._num_sorted = len(self._keys)

    def _keep(self, chosen: Tensor) -> None:
        self._keys, self._scores = self._keys[chosen], self._scores[chosen]
        self._places = self._places[chosen]

    def _compare(self) -> None:
        """Drop candidates that cannot be among the best in any quarter."""
        self._sort()
        before = 0
        while len(self._keys) <= _SHRINKS * before or before == 0:
            before = len(self._keys)
            stays = self._scores >= self._enough()
            dropped = self._places[~stays]
            self._free = torch.cat([self._free, dropped[dropped >= 0]])
            self._keep(stays.nonzero()[:, 0])
        self._num_compared = self._num_sorted = len(self._keys)

    def _enough(self) -> Tensor:
        """Scores below which candidates, in order, are sure to be dropped, (C,) int32."""
        keys, scores = self._keys, self._scores
        latents, values = _latents_and_values(keys)
        share = values / self.largest[latents]
        root = torch.where(share <= 1 / 2, 2.0, torch.where(share <= 3 / 4, 3 / 2, 4 / 3)).sqrt()
        root *= _NARROWER
        at = torch.arange(len(keys), device=keys.device)
        last = torch.searchsorted(keys, _keys(latents, values * root), right=True) - 1
        first = torch.searchsorted(keys, _keys(latents, values / root), right=True)
        above = self._nth_best(scores, last - at)
        below = self._nth_best(scores.flip(0), (at - first).flip(0)).flip(0)
        low = (share <= 1 / RANGES).nonzero()[:, 0]
        low = low[stable_order(-scores[low].long())]
        low = low[stable_order(latents[low])]
        nth = low[_ranks(latents[low]) == self.size - 1]
        lowest = torch.zeros(len(self.largest), dtype=torch.int32, device=keys.device)
        lowest[latents[nth]] = scores[nth]
        # Around whatever lies between two candidates are those above the first and those
        # below the second; no candidate of the latent, no score to reach. A gap across m / 2 or
        # 3m / 4 is no exception: the quarter above it reaches up to 3m / 4 or m at least.
        gaps = torch.minimum(above, torch.cat([below[1:], below.new_zeros(1)]))
        self._tested = self.largest.clone()
        bins = self._bins(latents, values)
        first = torch.searchsorted(bins, torch.arange(len(self._thresholds), device=keys.device))
        # A bin has the gap that reaches into it from below, and the gaps that begin in it.
        self._thresholds = torch.cat([gaps.new_zeros(1), gaps])[first]
        self._thresholds.scatter_reduce_(0, bins, gaps, "amin")
        self._thresholds.view(-1, _BINS + 2)[:, 0] = lowest
        return torch.where(share <= 1 / RANGES, lowest[latents], torch.minimum(above, below))

    def _nth_best(self, scores_C: Tensor, reach_C: Tensor) -> Tensor:
        """S-th largest score among the next `reach_C` candidates, 0 if they are fewer, (C,)."""
        width = _REACH * self.size
        steps = torch.arange(1, width + 1, device=scores_C.device)
        following = torch.cat([scores_C, scores_C.new_zeros(width)]).unfold(0, width + 1, 1)[:, 1:]
        at_once = max(1, _COMPARED // width)
        best = [
            nth_largest(torch.where(steps <= reach[:, None], those, 0), self.size)
            for those, reach in zip(
                torch.split(following, at_once), torch.split(reach_C, at_once), strict=True
            )
        ]
        return torch.cat(best)


def _keys(latents_E: Tensor, values_E: Tensor) -> Tensor:
    return latents_E << _LATENT_BITS | values_E.view(torch.int32)


def _latents_and_values(keys_C: Tensor) -> tuple[Tensor, Tensor]:
    return keys_C >> _LATENT_BITS, keys_C.int().view(torch.float32)


def _ranks(sorted_C: Tensor) -> Tensor:
    """Equal numbers before each, (C,) int64."""
    _, counts = torch.unique_consecutive(sorted_C, return_counts=True)
    at: Tensor = torch.arange(len(sorted_C), device=sorted_C.device)
    first: Tensor = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return at - first
