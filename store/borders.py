"""One count over several stores: which of them an item is from, and its number there."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError


class Borders:
    """Where one store ends and the next begins, in a count that goes through all.

    Args:
        what: is counted; for messages.
        sizes: how many each store has.
    """

    def __init__(self, what: str, sizes: Iterable[int]) -> None:
        self._what = what
        self.starts = [0, *accumulate(sizes)]
        """First item of each store, then the number of all items."""

    @property
    def total(self) -> int:
        """Number of all items."""
        return self.starts[-1]

    def spans(self, start: int, stop: int | None) -> Iterator[tuple[int, int, int]]:
        """(store, first, end) in the store's own count of the items start … stop − 1.

        At least one, so that no items have a type too.

        Raises:
            InputError: there are no such items.
        """
        stop = self.total if stop is None else stop
        if not 0 <= start <= stop <= self.total:
            raise InputError(f"{self._what} {start} to {stop} are not in 0 to {self.total}")
        at = min(bisect_right(self.starts, start), len(self.starts) - 1) - 1
        while True:
            first = self.starts[at]
            yield at, start - first, min(stop, self.starts[at + 1]) - first
            at += 1
            start = self.starts[at]
            if stop <= start:
                return

    def origin(self, items: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(n,) index of the store that each of (n,) items is from."""
        return np.searchsorted(self.starts[1:-1], items, side="right").astype(np.int64)
