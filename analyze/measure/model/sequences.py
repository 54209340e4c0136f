"""Sequences of a store as its transformer was given them, and the tokens that count.

B = sequences, T = context length.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.analyze.selection import Int
from mlsae.models.inputs import Inputs
from mlsae.store import PADDING, AnyStore
from mlsae.store.read.corpus import sequence_origin


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences:
    """Some sequences, ready for a forward pass."""

    numbers: Int
    """(B,) indices of the sequences in the store."""

    inputs: Inputs
    """Attention as it was when the store was made: inside documents, past padding, or neither."""

    eligible: Tensor
    """(B, T) bool: no flag, and a position that training did not skip; a row or not."""

    counted: Tensor
    """(B, T − 1) bool: whose next token is scored, see `counted_targets`."""


def counted_targets(
    documents_BT: npt.NDArray[np.uint32], flags_BT: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Positions whose next token is scored: (B, T − 1) bool.

    The next token lies in the same document and carries no flag, and the position itself is no
    padding. A separator is never a target: whether a model was taught to predict what the packing
    put there says nothing of its activations. It may be the input that a target is predicted from.
    """
    counted: npt.NDArray[np.bool_] = documents_BT[:, 1:] == documents_BT[:, :-1]
    counted &= flags_BT[:, 1:] == 0
    counted &= flags_BT[:, :-1] & PADDING == 0
    return counted


def read_sequences(
    store: AnyStore, sequences: Int, skip_positions: int, at_once: int, device: torch.device
) -> Iterator[Sequences]:
    """Sequences of a store, some at once.

    Args:
        store: any; one that names no packing in its source was made of whole sequences, each one
            text.
        sequences: sorted indices.
        skip_positions: tokens at positions below are not eligible.
        at_once: sequences of a batch; the last may have fewer.
        device: device of the tensors.
    """
    length = store.context_length
    packing = store.source.get("packing")
    if not isinstance(packing, Mapping):
        packing = {}
    for first in range(0, len(sequences), at_once):
        numbers = sequences[first : first + at_once]
        spans = [(start, start + length) for start in (numbers * length).tolist()]
        tokens = np.stack([store.tokens(*span) for span in spans])
        documents = np.stack([store.documents(*span) for span in spans])
        flags = np.stack([store.token_flags(*span) for span in spans])
        eligible = flags == 0
        eligible[:, :skip_positions] = False
        # The input of a transformer may depend on the place of a token in the text of its store.
        _, own = sequence_origin(store, numbers)
        inputs = Inputs(
            tokens=torch.from_numpy(tokens.astype(np.int64)).to(device),
            documents=torch.from_numpy(documents.astype(np.int64))
            if packing.get("isolate_documents")
            else None,
            padding=torch.from_numpy(flags & PADDING != 0)
            if packing.get("packing") == "document"
            else None,
            indices=torch.from_numpy(own[:, None] * length + np.arange(length)),
        )
        yield Sequences(
            numbers=numbers,
            inputs=inputs,
            eligible=torch.from_numpy(eligible).to(device),
            counted=torch.from_numpy(counted_targets(documents, flags)).to(device),
        )
