"""The slices in memory: a fixed set of reused buffers, each holding one part of a slice."""

import threading
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt


class WindowClosedError(Exception):
    """The window was closed while a thread waited for a buffer."""


class Window:
    """Buffers of rows, lent to slots and given back when the last batch that uses them is cut.

    One thread fills buffers, ahead of another that cuts batches from them.

    Args:
        num_buffers: at least as many as slots that are open at once.
        buffer_rows: rows of a buffer.
        d_model: width of a row.
        dtype: as stored.
    """

    def __init__(
        self, num_buffers: int, buffer_rows: int, d_model: int, dtype: np.dtype[Any]
    ) -> None:
        self.rows = np.empty((num_buffers * buffer_rows, d_model), dtype)
        """(num_buffers · buffer_rows, d_model), buffer after buffer."""
        self.buffers = self.rows.reshape(num_buffers, buffer_rows, d_model)
        self._free = list(range(num_buffers))
        self._retired: deque[tuple[int, list[int]]] = deque()
        self._cut = -1
        self._closed = False
        self._changed = threading.Condition()

    def exchange(self, step: int, old: list[int], count: int) -> npt.NDArray[np.int64]:
        """Give back `old`, which no batch from `step` on uses, and take `count` buffers.

        Waits until so many are free, at the latest when the batch before `step` is cut.

        Raises:
            WindowClosedError: `close` was called meanwhile.
        """
        with self._changed:
            self._retired.append((step, old))
            self._release()
            self._changed.wait_for(lambda: len(self._free) >= count or self._closed)
            if self._closed:
                raise WindowClosedError
            taken = self._free[len(self._free) - count :]
            del self._free[len(self._free) - count :]
            return np.array(taken, np.int64)

    def mark_cut(self, step: int) -> None:
        """Batch `step` has been cut: what only it and earlier ones used becomes free."""
        with self._changed:
            self._cut = step
            self._release()
            self._changed.notify_all()

    def close(self) -> None:
        """Wake a thread that waits for a buffer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _release(self) -> None:
        while self._retired and self._retired[0][0] <= self._cut + 1:
            self._free += self._retired.popleft()[1]
