"""The best events in each of many groups, out of a stream, however long.

Shapes: G groups, S events kept a group, C events that are offered, A events that are kept, U
groups that something is offered to.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Field:
    """Numbers that are kept with every event."""

    width: int
    """Numbers an event."""

    dtype: torch.dtype
    """The numbers' type."""


class Best:
    """Keeps the events with the largest scores in each group, the earlier among equal ones.

    Scores are int32 from 1 on. The bits of a float32 above 0 are one: their order is that of the
    values.

    Memory: `num_bytes`, however many events there are.

    Args:
        num_groups: G.
        size: S, events kept a group.
        fields: numbers kept with an event, by name.
        device: device for the tensors.
    """

    def __init__(
        self, num_groups: int, size: int, fields: Mapping[str, Field], device: torch.device
    ) -> None:
        self.size = size
        # Negative scores, ascending: the best first, 0 where there is none.
        self._costs_GS = torch.zeros(num_groups, size, dtype=torch.int32, device=device)
        # Events do not move when their rank changes; this says where the one at each rank lies.
        self._slots_GS = torch.arange(size, dtype=torch.int32, device=device).repeat(num_groups, 1)
        self._fields = {
            name: torch.zeros(num_groups * size, of.width, dtype=of.dtype, device=device)
            for name, of in fields.items()
        }

    def passes(self, groups_E: Tensor, scores_E: Tensor) -> Tensor:
        """True for each later event that would be kept if it came alone, (E,) bool."""
        return -scores_E < self._costs_GS[:, -1][groups_E]

    def place(self, groups_C: Tensor, scores_C: Tensor) -> tuple[Tensor, Tensor]:
        """Take events in; `write` must follow.

        Args:
            groups_C: each event's group, in the order that decides between equal scores; all of
                them come after all events offered before.
            scores_C: scores.

        Returns:
            (A,) int64 indices of the kept ones, and (A,) int64 places for `write`.
        """
        order = stable_order(-scores_C.long())
        order = order[stable_order(groups_C[order])]
        groups_U, counts_U = torch.unique_consecutive(groups_C[order], return_counts=True)
        place_C = torch.arange(len(order), device=order.device)
        rank_C = place_C - (counts_U.cumsum(0) - counts_U).repeat_interleave(counts_U)
        group_C = torch.arange(len(groups_U), device=order.device).repeat_interleave(counts_U)
        first = rank_C < self.size
        order, group_C, rank_C = order[first], group_C[first], rank_C[first]
        old_US, slots_US = self._costs_GS[groups_U], self._slots_GS[groups_U]
        new_US, event_US = torch.zeros_like(old_US), torch.zeros_like(old_US, dtype=torch.int64)
        new_US[group_C, rank_C] = -scores_C[order]
        event_US[group_C, rank_C] = order
        # Each one's rank after merging: its own, and how many others come before it.
        rank_S = torch.arange(self.size, device=order.device)
        to_old_US = rank_S + torch.searchsorted(new_US, old_US)
        to_new_US = rank_S + torch.searchsorted(old_US, new_US, right=True)
        stays_US = to_old_US < self.size
        enters_US = (to_new_US < self.size) & (new_US < 0)
        # As many enter a group as leave it, so both lists are in step.
        free_A = slots_US[~stays_US]
        group_US = torch.arange(len(groups_U), device=order.device)[:, None].expand_as(old_US)
        for kept_GS, old, new in (
            (self._costs_GS, old_US[stays_US], new_US[enters_US]),
            (self._slots_GS, slots_US[stays_US], free_A),
        ):
            merged_US = torch.empty_like(old_US)
            merged_US[group_US[stays_US], to_old_US[stays_US]] = old
            merged_US[group_US[enters_US], to_new_US[enters_US]] = new
            kept_GS[groups_U] = merged_US
        return event_US[enters_US], groups_U[group_US[enters_US]] * self.size + free_A

    def write(self, places_A: Tensor, **fields: Tensor) -> None:
        """Set the fields of the events that `place` has just kept, (A, width) each."""
        for name, values in fields.items():
            self._fields[name][places_A] = values

    def read(self, first: int, last: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Read the events in groups from `first` to before `last`.

        Returns:
            (groups, S) bool, and (groups, S, width) by field; each group's best first.
        """
        groups = torch.arange(first, last, device=self._slots_GS.device)[:, None]
        places = groups * self.size + self._slots_GS[first:last]
        return self._costs_GS[first:last] < 0, {
            name: values[places] for name, values in self._fields.items()
        }

    @staticmethod
    def num_bytes(num_groups: int, size: int, fields: Mapping[str, Field]) -> int:
        """Memory for one."""
        event = sum(of.width * of.dtype.itemsize for of in fields.values())
        return num_groups * size * (8 + event)


def stable_order(keys_C: Tensor) -> Tensor:
    """Indices that put integers in ascending order, equal ones as they are, (C,) int64."""
    if keys_C.device.type != "cpu":
        return torch.sort(keys_C, stable=True)[1]
    # numpy sorts plain integers in a CPU's widest registers, tens of times as fast as torch sorts
    # with indices: a key and its place go into one integer.
    bits = max(1, (len(keys_C) - 1).bit_length())
    keys = keys_C.numpy().astype(np.int64)
    if int(np.abs(keys).max(initial=0)).bit_length() + bits > 63:
        return torch.from_numpy(np.argsort(keys, kind="stable"))
    packed = (keys << bits) | np.arange(len(keys))
    packed.sort()
    return torch.from_numpy(packed & ((1 << bits) - 1))


def nth_largest(numbers_CW: Tensor, n: int) -> Tensor:
    """The n-th largest in each row, (C,)."""
    if numbers_CW.device.type != "cpu":
        return numbers_CW.topk(n).values[:, -1]
    # numpy does it in a CPU's widest registers, ten times as fast as torch.
    place = numbers_CW.shape[1] - n
    return torch.from_numpy(np.partition(numbers_CW.numpy(), place, axis=1)[:, place].copy())
