"""Inputs of forward passes: whole sequences of packed text, always in one shape.

B = sequences, T = positions of a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.models.inputs import Inputs
from mlsae.store import PADDING
from mlsae.store.format.positions import kept_positions
from mlsae.store.plan import KeptPositions

Slice = Callable[[int, int], npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """Some sequences, ready for a forward pass."""

    inputs: Inputs
    """Always `batch_sequences` sequences, because the shape of a pass decides bits; a short batch
    is filled up with token 0."""
    rows: npt.NDArray[np.int64]
    """(num_rows,) positions, among the B · T, whose activations are stored."""
    first_row: int
    """Index of the first stored row in the store."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Cuts batches from packed text."""

    tokens: Slice
    """start, stop → (stop − start,) token ids."""
    documents: Slice | None
    """start, stop → document indices, where attention does not cross documents."""
    token_flags: Slice | None
    """start, stop → token flags, where sequences are padded."""
    context_length: int
    """Tokens of a sequence."""
    batch_sequences: int
    """Sequences of a forward pass."""
    keep: KeptPositions | None = None
    """Positions of each sequence whose activations are stored; None for all."""

    def batch(self, first_sequence: int, num_sequences: int) -> TextBatch:
        """The batch that begins at a sequence."""
        length = self.context_length
        start, stop = first_sequence * length, (first_sequence + num_sequences) * length
        if self.keep is None:
            rows = np.arange(stop - start)
        else:
            positions = kept_positions(
                self.keep.seed, first_sequence, num_sequences, length, self.keep.num
            )
            rows = (positions + np.arange(num_sequences)[:, None] * length).reshape(-1)
        return TextBatch(
            inputs=Inputs(
                tokens=self._tensor(self.tokens(start, stop).astype(np.int64)),
                documents=self.documents
                and self._tensor(self.documents(start, stop).astype(np.int64)),
                padding=self.token_flags
                and self._tensor(self.token_flags(start, stop) & PADDING != 0),
                first_token=start,
            ),
            rows=rows,
            first_row=first_sequence * (length if self.keep is None else self.keep.num),
        )

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        filled = np.zeros(self.batch_sequences * self.context_length, values.dtype)
        filled[: len(values)] = values
        return torch.from_numpy(filled).reshape(-1, self.context_length)
