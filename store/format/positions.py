"""Tokens that are rows: all of them, or a seeded choice of positions in every sequence.

Written out in storage_schema.md (R-ROW-3), because it decides bytes: it may never change.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError

Int64 = npt.NDArray[np.int64]

MAX_KEPT_CONTEXT = 2**24
"""Longest sequence of which some positions are kept: choosing them takes a table as long."""
_MASK_BYTES = 1 << 24
"""Most bytes in the table of taken positions; sequences are drawn in blocks that fit."""


def check_num_positions(num_positions: int, context_length: int) -> None:
    """Refuse to keep no position, more than a sequence has, or some in too long a sequence.

    Raises:
        InputError: naming the range.
    """
    if not 1 <= num_positions <= context_length:
        raise InputError(
            f"keep_positions must be 1 to the context length {context_length}, got {num_positions}"
        )
    if context_length > MAX_KEPT_CONTEXT:
        raise InputError(
            f"keep_positions needs a context length of at most {MAX_KEPT_CONTEXT}, got "
            f"{context_length}"
        )


def kept_positions(
    seed: int, first_sequence: int, num_sequences: int, context_length: int, num_positions: int
) -> Int64:
    """The positions whose activations are stored, for some sequences; a pure function.

    Each sequence's are a uniform choice without replacement (Floyd's algorithm: Bentley and Floyd
    1987, "Programming pearls: a sample of brilliance"), independent of the other sequences and of
    how many there are. Where over half are kept, those left out are drawn instead.

    Args:
        seed: any integer.
        first_sequence: index of the first sequence asked for.
        num_sequences: sequences asked for.
        context_length: positions of a sequence.
        num_positions: positions kept in a sequence.

    Returns:
        (num_sequences, num_positions) int64, ascending within a sequence.

    Raises:
        InputError: num_positions is not in 1 … context_length.
    """
    check_num_positions(num_positions, context_length)
    out = np.empty((num_sequences, num_positions), np.int64)
    block = max(1, _MASK_BYTES // context_length)
    for start in range(0, num_sequences, block):
        piece = out[start : start + block]
        piece[...] = _draw(seed, first_sequence + start, len(piece), context_length, num_positions)
    return out


def _draw(seed: int, first: int, count: int, context_length: int, num_positions: int) -> Int64:
    inverted = 2 * num_positions > context_length
    num_draws = context_length - num_positions if inverted else num_positions
    taken = np.zeros((count, context_length), np.bool_)
    # The raw stream of a bit generator is fixed for good; methods of Generator may change.
    key = hashlib.sha256(f"mlsae positions {seed}".encode()).digest()
    generator = np.random.PCG64(int.from_bytes(key, "little"))
    generator.advance(first * num_draws)
    raw = generator.random_raw(count * num_draws).reshape(count, num_draws) >> np.uint64(32)
    sequences = np.arange(count)
    for draw in range(num_draws):
        last = context_length - num_draws + draw
        chosen = ((raw[:, draw] * np.uint64(last + 1)) >> np.uint64(32)).astype(np.int64)
        chosen[taken[sequences, chosen]] = last
        taken[sequences, chosen] = True
    positions = np.flatnonzero(taken != inverted).reshape(count, num_positions)
    positions -= sequences[:, None] * context_length
    return positions
