"""Sequences held out for validation: a pure function, shared by every later stage."""

import hashlib

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.units import counted
from mlsae.store.read.interface import AnyStore


def validation_of(store: AnyStore, fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Sorted indices of the sequences that a store or a corpus holds out.

    A corpus holds out those of its stores together, so that an SAE of a corpus and one of a store
    in it hold out the same sequences of that store.

    Args:
        store: store whose text alone decides.
        fraction: argument of `validation_sequences`.
        seed: argument of `validation_sequences`.

    Returns:
        (num_validation,) int64.

    Raises:
        InputError: as `validation_sequences`; the message names the store.
    """
    held_out, first = [], 0
    for member in store.stores:
        try:
            found = validation_sequences(
                member.plan.tokens_sha256, member.num_sequences, fraction, seed
            )
        except InputError as error:
            raise InputError(f"{member.place}: {error}") from None
        held_out.append(found + first)
        first += member.num_sequences
    return np.concatenate(held_out)


def validation_sequences(
    tokens_sha256: str, num_sequences: int, fraction: float, seed: int
) -> npt.NDArray[np.int64]:
    """Sorted indices of held-out sequences.

    They depend on the text and the seed alone, so stores with other encodings, layers, sites or
    initialisations for the same text share them.

    Args:
        tokens_sha256: the plan's hash over the token ids.
        num_sequences: sequences in the store.
        fraction: share of sequences to hold out, 0 ≤ fraction < 1; rounded to whole sequences,
            at least one if the fraction is above 0.
        seed: any integer.

    Returns:
        (num_validation,) int64.

    Raises:
        InputError: the fraction is out of range or would leave no sequence to train on.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"validation fraction must be at least 0 and below 1, got {fraction}")
    count = max(1, round(num_sequences * fraction)) if fraction > 0 else 0
    if count >= num_sequences:
        raise InputError(
            f"validation fraction {fraction} holds out {count} of "
            f"{counted(num_sequences, 'sequence')} and leaves none to train on: "
            f"lower it or harvest more text"
        )
    key = hashlib.sha256(f"mlsae validation {tokens_sha256} {seed}".encode()).digest()
    # A bit generator's raw stream is fixed for good; methods of Generator may change.
    rank = np.random.PCG64(int.from_bytes(key, "little")).random_raw(num_sequences)
    return np.sort(np.argsort(rank, kind="stable")[:count]).astype(np.int64)
