"""From a row to its token: the token's index, flags and position, and the row's group."""

import numpy as np
import numpy.typing as npt

from mlsae.base.units import whole
from mlsae.store.errors import InvalidStoreError
from mlsae.store.format.moments import group_of_rows
from mlsae.store.places.objects import Objects
from mlsae.store.plan import Plan
from mlsae.store.read.setup import token_readers
from mlsae.store.schema import ROW_TOKEN

_BLOCK_TOKENS = 1 << 20


class RowIndex:
    """Reads the token arrays of a store by token and by row. Threads may share it."""

    def __init__(self, objects: Objects, plan: Plan) -> None:
        self.readers = token_readers(objects, plan)
        self._plan = plan
        self._place = objects.place

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """(stop − start,) index of each row's token.

        Raises:
            InvalidStoreError: the store has no such token.
        """
        start, stop = whole("the first row", start), whole("the end of rows", stop)
        if ROW_TOKEN in self.readers:
            tokens = self.readers[ROW_TOKEN].read(start, stop)
            if tokens.max(initial=0) >= self._plan.num_tokens:
                raise InvalidStoreError(
                    f"{self._place}/{ROW_TOKEN}: rows {start} to {stop} name tokens that the store "
                    f"does not have; restore it from a copy",
                    rule="R-ROW-3",
                )
            found: npt.NDArray[np.int64] = tokens.astype(np.int64)
            return found
        return np.arange(start, stop, dtype=np.int64)

    def positions(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """(stop − start,) position of each row's token within its sequence."""
        return self.tokens(start, stop) % self._plan.context_length

    def flags(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """(stop − start,) token_flags of each row's token."""
        if ROW_TOKEN not in self.readers:
            return self.readers["token_flags"].read(start, stop)
        start, stop = whole("the first row", start), whole("the end of rows", stop)
        flags = np.empty(stop - start, np.uint8)
        block = max(1, _BLOCK_TOKENS // self._plan.context_length) * self._plan.rows_per_sequence
        for first in range(start, stop, block):
            tokens = self.tokens(first, min(first + block, stop))
            low, high = int(tokens.min()), int(tokens.max())
            of_span = self.readers["token_flags"].read(low, high + 1)
            flags[first - start : first - start + len(tokens)] = of_span[tokens - low]
        return flags

    def groups(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        """(stop − start,) index into `moments.GROUPS` of each row."""
        return group_of_rows(self.flags(start, stop), self.positions(start, stop))
