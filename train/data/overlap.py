"""Text that is on both sides of a split: sequences, and documents, in one store or in two.

A document is the tokens of one index without a flag, whatever sequences they lie in. Equal tokens
have equal hashes: sums of tokens times fixed random numbers by position, modulo 2⁶⁴.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.output.console import say
from mlsae.base.units import counted
from mlsae.store import AnyStore, Store

MOST_SHARED = 0.01
"""Share of the held-out sequences that other stores may repeat by chance."""
_BLOCK_TOKENS = 1 << 20
_POSITIONS = 1 << 16
"""Positions of a document before the random numbers begin again."""

UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Text held out that is trained on, too."""

    num_held_out: int
    """Sequences held out."""
    num_equal: int
    """Those whose tokens are the tokens of a sequence that is trained on."""
    num_equal_elsewhere: int
    """Those that are equal to one of another store."""
    share_of_documents: float | None
    """Share of the tokens held out whose documents are trained on; None without such tokens."""
    num_shared_documents: int
    """Documents that lie in more than one store."""

    def check(self) -> None:
        """Refuse stores that repeat each other's text.

        Raises:
            InputError: over 1% of the held-out sequences are trained on in another store.
        """
        if self.num_equal_elsewhere > MOST_SHARED * self.num_held_out:
            raise InputError(
                f"tokens of {self.num_equal_elsewhere:,} of {self._held_out()} are those of a "
                f"sequence that is trained on in another store: give one store alone or stores of "
                f"different text, or hold nothing out by --validation-fraction 0"
            )

    def lines(self) -> Iterator[str]:
        """Lines for people about what is shared; none where nothing is."""
        if self.share_of_documents:
            yield (
                f"{self.share_of_documents:.0%} of the tokens held out are in documents that are "
                f"trained on in part"
            )
        if self.num_shared_documents:
            shared = counted(self.num_shared_documents, "document")
            yield f"warning: the stores have {shared} in common"
        if self.num_equal:
            yield (
                f"warning: tokens of {self.num_equal:,} of {self._held_out()} are those of a "
                f"sequence that is trained on, so that their figures flatter the SAE"
            )

    def tell(self) -> None:
        """Print the lines, warnings to standard error."""
        for line in self.lines():
            say(line, err=line.startswith("warning"))

    def _held_out(self) -> str:
        return f"{counted(self.num_held_out, 'sequence')} held out"

    def record(self) -> dict[str, Any]:
        """Entries for training.json."""
        return {
            "num_equal_sequences": self.num_equal,
            "share_of_documents": self.share_of_documents,
            "num_shared_documents": self.num_shared_documents,
        }


def measure(store: AnyStore, validation: npt.NDArray[np.int64]) -> Overlap:
    """Read all tokens and see what of the text held out is trained on.

    Memory: 8 bytes a sequence, and 32 a document.

    Args:
        store: one store, or several as one.
        validation: (n,) ascending indices of the sequences held out.
    """
    is_held = np.zeros(store.num_sequences, dtype=bool)
    is_held[validation] = True
    sequences, documents, first = [], [], 0
    for number, member in enumerate(store.stores):
        held = is_held[first : first + member.num_sequences]
        first += member.num_sequences
        hashes, found = _of_store(member, held)
        sequences.append(np.stack([hashes, held, np.full(len(held), number)], axis=1))
        documents.append(np.column_stack([found, np.full(len(found), number)]))
    of_sequence, of_document = np.concatenate(sequences), np.concatenate(documents)
    equal, elsewhere = _equal(of_sequence)
    group, hash_of = np.unique(of_document[:, 0], return_inverse=True)
    held, trained = (
        np.bincount(hash_of, weights=of_document[:, i], minlength=len(group)) for i in (1, 2)
    )
    stores = np.unique(np.stack([hash_of, of_document[:, 3].astype(np.int64)]), axis=1)[0]
    return Overlap(
        num_held_out=len(validation),
        num_equal=equal,
        num_equal_elsewhere=elsewhere,
        share_of_documents=float(held[trained > 0].sum() / held.sum()) if held.any() else None,
        num_shared_documents=int((np.bincount(stores) > 1).sum()) if len(stores) else 0,
    )


def _equal(of_sequence: UInt64) -> tuple[int, int]:
    """Sequences held out that equal one trained on, anywhere and in another store."""
    hashes, is_held, store = of_sequence[:, 0], of_sequence[:, 1] > 0, of_sequence[:, 2]
    equal = np.isin(hashes[is_held], hashes[~is_held]).sum()
    elsewhere = sum(
        np.isin(hashes[is_held & (store == one)], hashes[~is_held & (store != one)]).sum()
        for one in np.unique(store)
    )
    return int(equal), int(elsewhere)


def _of_store(store: Store, held: npt.NDArray[np.bool_]) -> tuple[UInt64, UInt64]:
    """Hash of each sequence; hash, tokens held out and tokens trained on of each document."""
    length = store.context_length
    factors = np.random.PCG64(0).random_raw(max(length, _POSITIONS))
    together = max(1, _BLOCK_TOKENS // length)
    hashes, documents = [], _Documents(factors[:_POSITIONS])
    for first in range(0, store.num_sequences, together):
        last = min(first + together, store.num_sequences)
        span = (first * length, last * length)
        tokens = store.tokens(*span).astype(np.uint64) + np.uint64(1)
        hashes.append((tokens.reshape(-1, length) * factors[:length]).sum(axis=1))
        counts = store.token_flags(*span) == 0
        is_held = np.repeat(held[first:last], length)[counts]
        documents.add(tokens[counts], store.documents(*span)[counts], is_held)
    return np.concatenate(hashes), documents.finish()


class _Documents:
    """Hash and tokens of each document, of which one may go on in the next block."""

    def __init__(self, factors: UInt64) -> None:
        self._factors = factors
        self._found: list[UInt64] = []
        self._open: tuple[int, UInt64] | None = None
        """Index and line of the last document, which may go on."""

    def add(
        self,
        tokens: UInt64,
        documents: npt.NDArray[np.uint32],
        is_held: npt.NDArray[np.bool_],
    ) -> None:
        if not len(tokens):
            return
        starts = np.concatenate([[0], np.flatnonzero(np.diff(documents)) + 1])
        place = np.arange(len(tokens)) - np.repeat(starts, np.diff([*starts, len(tokens)]))
        goes_on = self._open is not None and self._open[0] == documents[0]
        if goes_on and self._open is not None:
            before = int(self._open[1][1:].sum())
            place[: starts[1] if len(starts) > 1 else None] += before
        lines = np.stack(
            [
                np.add.reduceat(tokens * self._factors[place % len(self._factors)], starts),
                np.add.reduceat(is_held.astype(np.uint64), starts),
                np.add.reduceat((~is_held).astype(np.uint64), starts),
            ],
            axis=1,
        )
        if self._open is not None:
            if goes_on:
                lines[0] += self._open[1]
            else:
                self._found.append(self._open[1][None])
        self._found.append(lines[:-1])
        self._open = int(documents[-1]), lines[-1]

    def finish(self) -> UInt64:
        """(n, 3) hash, tokens held out and tokens trained on."""
        if self._open is not None:
            self._found.append(self._open[1][None])
        return np.concatenate(self._found) if self._found else np.zeros((0, 3), np.uint64)
