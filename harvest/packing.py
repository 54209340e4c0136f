"""Documents to whole sequences of tokens: joined by separators and cut, none left out.

The text is one stream, document after document, each closed by EOS (or opened by BOS, where the
tokenizer has no EOS). Where the tokenizer adds a BOS to what it encodes, the model has hardly seen
a sequence without one, so a BOS also opens every sequence and the stream goes on behind it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.files import canonical_json
from mlsae.store import SPECIAL

DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Joints:
    """How a tokenizer's documents are joined."""

    eos: int | None
    """Token that closes every document."""
    bos: int | None
    """Token that opens every document but the first; only where there is no `eos`."""
    opening: int | None
    """Token that opens every sequence; only where the tokenizer adds it by default."""

    @classmethod
    def of(cls, tokenizer: Any) -> "Joints":
        """Read them off a tokenizer: its EOS and BOS, and what it puts before a plain text."""
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos] != plain[:1]
        return cls(eos=eos, bos=bos if eos is None else None, opening=bos if adds_bos else None)

    def describe(self) -> dict[str, Any]:
        """The `packing` entry of a store's source."""
        return {
            "document_eos": self.eos,
            "document_bos": self.bos,
            "sequence_bos": self.opening,
            "isolate_documents": False,
        }


@dataclass(frozen=True, kw_only=True)
class PackedText:
    """Whole sequences of `context_length` tokens, one after another."""

    tokens: npt.NDArray[np.uint32]
    """(num_tokens,) token ids."""
    documents: npt.NDArray[np.uint32]
    """(num_tokens,) index in the data set of the document a token belongs to; an opening BOS
    belongs to the document it stands before."""
    token_flags: npt.NDArray[np.uint8]
    """(num_tokens,) SPECIAL where the tokenizer counts the token among its special ones."""
    context_length: int
    """Tokens of a sequence."""
    num_documents: int
    """Documents of which at least one token was read."""
    num_empty: int
    """Documents without a token, which are passed over."""
    num_left_over: int
    """Tokens of the final incomplete sequence, which is left out; 0 where the text went on."""


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hex SHA-256 of what a tokenizer's ids mean: its vocabulary and its special tokens."""
    return hashlib.sha256(
        canonical_json(
            {
                "vocabulary": tokenizer.get_vocab(),
                "special": sorted(tokenizer.all_special_ids),
                "bos": tokenizer.bos_token_id,
                "eos": tokenizer.eos_token_id,
            }
        )
    ).hexdigest()


def pack(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    context_length: int,
    max_tokens: int | None = None,
    report: Callable[[int], object] = lambda _: None,
) -> PackedText:
    """Tokenise documents, join them and cut whole sequences.

    Args:
        texts: the documents; read no further than `max_tokens` needs.
        tokenizer: a transformers tokenizer.
        context_length: tokens of a sequence.
        max_tokens: most tokens; rounded down to whole sequences.
        report: called with the number of tokens of each piece of text as it is tokenised.

    Raises:
        InputError: there is no text, or less than one sequence of it.
    """
    joints = Joints.of(tokenizer)
    body_length = context_length - (joints.opening is not None)
    most = None if max_tokens is None else max_tokens // context_length
    if most == 0:
        raise InputError(
            f"--max-tokens {max_tokens} is less than one sequence of {context_length} tokens; "
            "raise it or lower --context-length"
        )
    pieces: list[npt.NDArray[np.uint32]] = []
    lengths: list[int] = []
    num_read = 0
    for ids in _joined(texts, tokenizer, joints):
        lengths.append(len(ids))
        if ids:
            pieces.append(np.asarray(ids, np.uint32))
            num_read += len(ids)
            report(len(ids))
        if most is not None and num_read >= most * body_length:
            break
    num_sequences = num_read // body_length
    if most is not None:
        num_sequences = min(num_sequences, most)
    if num_sequences == 0:
        raise InputError(
            f"the data set holds {num_read:,} tokens, less than one sequence of {context_length}; "
            "give more text or a smaller --context-length"
            if num_read
            else "the data set is empty: it holds no text"
        )
    used = num_sequences * body_length
    tokens = np.concatenate(pieces)[:used].reshape(num_sequences, body_length)
    index = np.arange(len(lengths), dtype=np.uint32)
    documents = np.repeat(index, lengths)[:used].reshape(num_sequences, body_length)
    if joints.opening is not None:
        first = np.full(num_sequences, joints.opening, np.uint32)
        tokens = np.column_stack([first, tokens])
        documents = np.column_stack([documents[:, 0], documents])
    special = np.isin(tokens, np.asarray(tokenizer.all_special_ids, np.uint32))
    return PackedText(
        tokens=tokens.reshape(-1),
        documents=documents.reshape(-1),
        token_flags=np.where(special, SPECIAL, 0).astype(np.uint8).reshape(-1),
        context_length=context_length,
        num_documents=sum(1 for length in lengths if length),
        num_empty=sum(1 for length in lengths if not length),
        num_left_over=0 if num_sequences == most else num_read - used,
    )


def _joined(texts: Iterable[str], tokenizer: Any, joints: Joints) -> Iterator[list[int]]:
    """The tokens of each document with its separator; an empty document has none."""
    closing = [] if joints.eos is None else [joints.eos]
    opening: list[int] = []
    remaining = iter(texts)
    while batch := list(islice(remaining, DOCUMENTS_AT_ONCE)):
        # `verbose` off: texts longer than the model's context are the rule here.
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for ids in encoded:
            if not ids:
                yield []
                continue
            yield [*opening, *ids, *closing]
            opening = [] if joints.bos is None else [joints.bos]
