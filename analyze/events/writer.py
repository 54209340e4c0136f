"""The table `events` of an analysis: the events of a layer, from part to part.

Shapes: N rows of a batch, K slots a row.
"""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from mlsae.analyze.events.part import PartWriter
from mlsae.analyze.events.plan import EventsPlan
from mlsae.analyze.results.records import PartRecord


class EventsWriter:
    """Writes the parts of a layer while its rows are read.

    A context manager; every part is written once the block has been left without an exception.

    Args:
        directory: existing folder of the data set.
        plan: the plan with the parts.
        layer: a layer id.
    """

    def __init__(self, directory: Path, plan: EventsPlan, layer: int) -> None:
        self._directory, self._plan = directory, plan
        self._left = [plan.part(layer, run) for run in plan.runs]
        self._writers: list[PartWriter] = []
        self._stack = ExitStack()
        self._end_row = 0

    @property
    def records(self) -> list[PartRecord]:
        """Records of the parts that are written."""
        return [writer.record for writer in self._writers if writer.record is not None]

    def append(
        self,
        rows_N: npt.NDArray[np.int64],
        tokens_N: npt.NDArray[np.int64],
        values_NK: npt.NDArray[np.float32],
        indices_NK: npt.NDArray[np.int64],
    ) -> None:
        """Add the active latents of the next rows, a batch of `EventsPlan.read`."""
        if len(rows_N) == 0:
            return
        while rows_N[0] >= self._end_row:
            self._begin_next()
        self._writers[-1].append(rows_N, tokens_N, values_NK, indices_NK)

    def _begin_next(self) -> None:
        self._stack.close()
        part = self._left.pop(0)
        self._end_row = part.end_row
        writer = self._plan.writer(self._directory, part, self._directory.parent)
        self._writers.append(self._stack.enter_context(writer))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while kind is None and self._left:
            # Rows that are all flagged make an empty part.
            self._begin_next()
        self._stack.__exit__(kind, error, trace)
