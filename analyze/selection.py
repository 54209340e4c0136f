"""Rows in a store that are evaluated, read chunk by chunk in constant memory."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.store import AnyStore, Store
from mlsae.store.read.split import validation_of

Int = npt.NDArray[np.int64]
Single = npt.NDArray[np.float32]
_Rows = tuple[Int, Int, Single]
"""Row numbers, each one's token index, activations."""

_ROWS_AT_ONCE = 2**20
"""Rows whose flags are read at once."""


def choose_sequences(
    store: AnyStore, rows: str, validation: Mapping[str, Any], max_tokens: int | None
) -> Int:
    """Sorted indices of the sequences to evaluate.

    Args:
        store: the store that is read; its own text decides the split.
        rows: `validation`, `train` or `all`.
        validation: the SAE's record of its split, with `fraction` and `seed`.
        max_tokens: keep the first sequences that together hold at most so many tokens.

    Raises:
        InputError: nothing was held out, or `max_tokens` is less than a sequence.
    """
    sequences = np.arange(store.num_sequences, dtype=np.int64)
    if rows != "all":
        held_out = validation_of(store, float(validation["fraction"]), int(validation["seed"]))
        if rows == "train":
            sequences = np.setdiff1d(sequences, held_out)
        elif len(held_out) == 0:
            raise InputError(
                "the SAE was trained with no sequence held out, so there are no validation rows: "
                "use --rows all"
            )
        else:
            sequences = held_out
    if max_tokens is not None:
        sequences = first_tokens(sequences, max_tokens, store.context_length)
        if len(sequences) == 0:
            raise InputError(
                f"--max-tokens {max_tokens} is less than one sequence of the store, "
                f"{store.context_length} tokens: give at least that many"
            )
    return sequences


def first_tokens(sequences: Int, max_tokens: int, context_length: int) -> Int:
    """The first sequences that together hold at most `max_tokens` tokens."""
    return sequences[: max_tokens // context_length]


def read_rows(
    store: AnyStore, site: str, layer: int, sequences: Int, batch_rows: int
) -> Iterator[_Rows]:
    """The unflagged rows in `sequences`, every stored position, in the store's order.

    Chunks without any are not read. Memory: one chunk, one batch, and flags and
    tokens for 2²⁰ rows.

    Yields:
        Row numbers (N,), each one's token index (N,) and decoded activations (N, d_model),
        0 < N ≤ `batch_rows`.
    """
    held: list[_Rows] = []
    num_held = 0
    for chunk in _chunks(store, site, layer, sequences):
        held.append(chunk)
        num_held += len(chunk[0])
        if num_held < batch_rows:
            continue
        *batches, rest = _cut(_joined(held), batch_rows)
        held, num_held = [rest], len(rest[0])
        # Readers of many layers wait for one another, and none of them holds what it has yielded.
        while batches:
            yield batches.pop(0)
    if num_held:
        yield _joined(held)


def _cut(rows: _Rows, size: int) -> Iterator[_Rows]:
    """Batches of `size` rows, and a copy of the rest, which may be empty."""
    numbers, tokens, x = rows
    whole = len(numbers) - len(numbers) % size
    for first in range(0, whole, size):
        own = slice(first, first + size)
        yield numbers[own], tokens[own], x[own]
    yield numbers[whole:].copy(), tokens[whole:].copy(), x[whole:].copy()


def _joined(held: list[_Rows]) -> _Rows:
    rows, tokens, x = zip(*held, strict=True)
    return np.concatenate(rows), np.concatenate(tokens), np.concatenate(x)


def _chunks(store: AnyStore, site: str, layer: int, sequences: Int) -> Iterator[_Rows]:
    """Unflagged rows in `sequences`, with tokens and activations, chunk by chunk."""
    first = 0
    for member in store.stores:
        low, high = np.searchsorted(sequences, [first, first + member.num_sequences])
        for start, stop, rows, tokens in _spans(member, sequences[low:high] - first):
            x = member.read(site, layer, start, stop)[rows - start]
            yield rows + first * store.rows_per_sequence, tokens + first * store.context_length, x
        first += member.num_sequences


def _spans(store: Store, sequences: Int) -> Iterator[tuple[int, int, Int, Int]]:
    """Chunks with unflagged rows in `sequences`: first row and end, those rows and their tokens."""
    length, size = store.rows_per_sequence, store.chunk_rows
    # Flags for many chunks at once: far away, each read takes a whole chunk of flags.
    block = size * max(1, _ROWS_AT_ONCE // size)
    for first in range(0, store.num_rows, block):
        last = min(first + block, store.num_rows)
        low, high = np.searchsorted(sequences, [first // length, (last - 1) // length + 1])
        if low == high:
            continue
        rows = (sequences[low:high, None] * length + np.arange(length)).ravel()
        rows = rows[(rows >= first) & (rows < last)]
        rows = rows[store.row_flags(first, last)[rows - first] == 0]
        tokens = store.row_tokens(first, last)[rows - first]
        for chunk in np.unique(rows // size).tolist():
            start, stop = chunk * size, min((chunk + 1) * size, last)
            of_chunk = slice(*np.searchsorted(rows, [start, stop]))
            yield start, stop, rows[of_chunk], tokens[of_chunk]
