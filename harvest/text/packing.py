"""Documents to whole sequences of tokens: joined and cut, one to a sequence, or as they are.

`concatenate`: the text is one stream, document after document, each closed by EOS (or opened by
BOS, where the tokenizer has no EOS), cut into sequences. `document`: each has a sequence of its
own, cut or padded. Where the tokenizer adds a BOS to what it encodes, the model has hardly seen a
context without one, so a BOS also opens every context, and the stream goes on behind it. `rows`:
token ids that are sequences already stay as they are.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.units import counted
from mlsae.harvest.text.joints import Joints
from mlsae.harvest.text.mixture import lags_most
from mlsae.harvest.text.sequences import SequenceBuilder
from mlsae.harvest.text.sources import Document, Source
from mlsae.harvest.text.tokenizing import tokenized
from mlsae.models.source.tokenizer import special_ids

FIRST_ROWS = 64
"""Rows of token ids by whose lengths `auto` finds that they are sequences already."""


@dataclass(kw_only=True)
class Taken:
    """Documents and tokens taken from one data set."""

    name: str
    """Name of the data set, as given."""
    share: float
    """Share of the tokens that the data set was to have; 1 where it is the only one."""
    num_documents: int = 0
    """Documents with a token in the sequences, or in the incomplete one that is left out."""
    num_empty: int = 0
    """Documents without a token, which are passed over."""
    num_tokens: int = 0
    """Tokens of these documents and their separators; no padding, no BOS that opens a context."""
    ran_out: bool = False
    """True where the text ended because this data set did."""
    note: str | None = None
    """Files of a directory that are read and those that are not, in a line."""


@dataclass(frozen=True, kw_only=True)
class PackedText:
    """Whole sequences of `context_length` tokens, one after another.

    The arrays are read-only maps of nameless files: they take no memory, and the disk has its
    space back when they are gone.
    """

    tokens: npt.NDArray[np.uint32]
    """(num_tokens,) token ids."""
    documents: npt.NDArray[np.uint32]
    """(num_tokens,) index, in the order drawn, of the document a token belongs to; an opening BOS
    belongs to the document it stands before, padding to the one it stands behind."""
    token_flags: npt.NDArray[np.uint8]
    """(num_tokens,) PADDING, or SPECIAL where the tokenizer counts the token among its special
    ones."""
    context_length: int
    """Tokens of a sequence."""
    joints: Joints
    """Tokens between documents; `joints.describe()` belongs to a store's plan."""
    taken: tuple[Taken, ...]
    """Documents and tokens from each data set."""
    num_left_over: int
    """Tokens of the final incomplete sequence, which is left out; 0 where the text went on."""
    num_cut: int
    """Tokens past the end of a sequence of their own, which are left out."""
    num_cut_documents: int
    """Documents that were cut."""
    num_padding: int
    """Tokens that only fill sequences up."""
    row_length: int | None = None
    """Tokens of each of the first rows of token ids, where all have one length; else None."""

    @property
    def num_documents(self) -> int:
        """Documents of which at least one token was read."""
        return sum(taken.num_documents for taken in self.taken)

    @property
    def num_empty(self) -> int:
        """Documents without a token, which are passed over."""
        return sum(taken.num_empty for taken in self.taken)


def pack(
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    context_length: int,
    max_tokens: int | None = None,
    packing: str = "auto",
    bos: str = "auto",
    isolate_documents: bool = False,
    spool: Path,
    report: Callable[[int], object] = lambda _: None,
) -> PackedText:
    """Tokenise documents and make whole sequences of them, in memory that does not grow.

    With several data sets, the next document always comes from the one whose share of the tokens
    lags most; where that one has no more, the text ends, so that the shares stay true.

    Args:
        sources: data sets, read little further than `max_tokens` needs.
        tokenizer: a transformers tokenizer.
        context_length: tokens of a sequence.
        max_tokens: most tokens; rounded down to whole sequences.
        packing: `concatenate`, `document`, `rows`, or `auto`: `rows` where the first rows of token
            ids all have `context_length` tokens and `bos` is not `always`, else `concatenate`.
        bos: `auto`, `always` or `never`, see `Joints.of`.
        isolate_documents: attention stays inside documents, so that a BOS opens each.
        spool: directory on the disk that holds the sequences; its nearest parent if absent.
        report: called with the number of tokens of each document as it is packed.

    Raises:
        InputError: there is no text, or less than one sequence of it; a source cannot be read; a
            row is no sequence.
        ResourceError: the disk is full, or a document too long for the memory.
    """
    documents_of, row_length = _peeked(sources)
    if packing == "auto":
        packing = "rows" if row_length == context_length and bos != "always" else "concatenate"
    joints = Joints.of(tokenizer, packing=packing, bos=bos, isolate_documents=isolate_documents)
    if len(joints.opening) >= context_length:
        raise InputError(
            f"--context-length {context_length} leaves no room for text behind the "
            f"{counted(len(joints.opening), 'token')} before it; raise it or use --bos never"
        )
    most = None if max_tokens is None else max_tokens // context_length
    if most == 0:
        raise InputError(
            f"--max-tokens {max_tokens} is less than one sequence of {context_length} tokens; "
            "raise it or lower --context-length"
        )
    sequences = SequenceBuilder(
        joints,
        context_length=context_length,
        max_sequences=most,
        special_ids=[*special_ids(tokenizer), *joints.opening],
        near=spool,
    )
    taken = tuple(
        Taken(name=source.name, share=source.share, note=source.note) for source in sources
    )
    with closing(sequences), ThreadPoolExecutor(1, "tokenise") as thread:
        streams = [tokenized(documents, tokenizer, thread) for documents in documents_of]
        while not sequences.is_full:
            drawn = taken[index := lags_most([(t.num_tokens, t.share) for t in taken])]
            ids = next(streams[index], None)
            if ids is None:
                drawn.ran_out = True
                break
            if packing == "rows" and len(ids) not in (0, context_length):
                raise InputError(_no_sequence(drawn, len(ids), context_length))
            num_tokens = sequences.add(ids)
            drawn.num_tokens += num_tokens
            drawn.num_documents += num_tokens > 0
            drawn.num_empty += num_tokens == 0
            report(num_tokens)
        if sequences.num_sequences == 0:
            raise InputError(_too_little(taken, context_length))
        num_left_over = sequences.num_in_last
        tokens, documents, token_flags = sequences.finish()
    return PackedText(
        tokens=tokens,
        documents=documents,
        token_flags=token_flags,
        context_length=context_length,
        joints=joints,
        taken=taken,
        num_left_over=num_left_over,
        num_cut=sequences.num_cut,
        num_cut_documents=sequences.num_cut_documents,
        num_padding=sequences.num_padding,
        row_length=row_length,
    )


def _peeked(sources: Sequence[Source]) -> tuple[list[Iterator[Document]], int | None]:
    """Documents of each source, and the length that all their first rows of token ids have."""
    streams: list[Iterator[Document]] = []
    lengths: set[int | None] = set()
    for source in sources:
        first = list(itertools.islice(source.documents, 1))
        if first and not isinstance(first[0], str):
            first += itertools.islice(source.documents, FIRST_ROWS - 1)
        lengths |= {None if isinstance(row, str) else len(row) for row in first}
        streams.append(itertools.chain(first, source.documents))
    return streams, lengths.pop() if len(lengths) == 1 else None


def _no_sequence(drawn: Taken, num_tokens: int, context_length: int) -> str:
    number = drawn.num_documents + drawn.num_empty
    return (
        f"row {number} of data set {drawn.name} holds {counted(num_tokens, 'token')}, no sequence "
        f"of {context_length:,}; give --packing concatenate to join and cut rows, or another "
        "--context-length"
    )


def _too_little(taken: Sequence[Taken], context_length: int) -> str:
    num_tokens = sum(one.num_tokens for one in taken)
    if num_tokens:
        return (
            f"the data set holds {counted(num_tokens, 'token')}, less than one sequence of "
            f"{context_length}; give more text or a smaller --context-length"
        )
    empty = [one.name for one in taken if one.ran_out]
    which = f" {empty[0]}" if len(taken) > 1 else ""
    return f"the data set{which} is empty: it holds no text"
