"""Texts to token ids: in large batches, on all cores, while the next batch is read.

A tokenizer written in Rust spreads a batch over the cores by itself (RAYON_NUM_THREADS limits it)
and frees Python meanwhile. One written in Python, which few models have, works on one core: copies
of it in processes of their own would start the calling program anew in each.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mlsae.base.machine.resources import require_memory
from mlsae.base.units import counted
from mlsae.harvest.text.sequences import Tokens
from mlsae.harvest.text.sources import Document
from mlsae.models.source.tokenizer import token_ids

FEWEST_CHARACTERS, MOST_CHARACTERS = 1 << 16, 1 << 21
"""Size of the first batch, so that little text is read for little, and of those that follow."""
MOST_DOCUMENTS = 1 << 14
BYTES_PER_CHARACTER = 200
"""Memory that a tokenizer takes for a character of a document."""


def tokenized(
    documents: Iterable[Document], tokenizer: Any, thread: ThreadPoolExecutor
) -> Iterator[Tokens]:
    """Tokenise documents, in order and without adding any special token.

    Args:
        documents: texts, or arrays of token ids, which are passed through.
        tokenizer: a transformers tokenizer.
        thread: tokenises batches, one at a time.

    Raises:
        InputError: a text is not valid Unicode, or the tokenizer fails on one.
        ResourceError: a text is too long to be tokenised in this machine's memory.
    """
    ahead = None
    for batch in _batches(documents):
        following = thread.submit(_encode, batch, tokenizer)
        if ahead is not None:
            yield from ahead.result()
        ahead = following
    if ahead is not None:
        yield from ahead.result()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in batches of like size; one that is longer than a batch is alone."""
    size, limit = 0, FEWEST_CHARACTERS
    batch: list[Document] = []
    for document in documents:
        if batch and (size + len(document) > limit or len(batch) == MOST_DOCUMENTS):
            yield batch
            batch, size, limit = [], 0, min(2 * limit, MOST_CHARACTERS)
        batch.append(document)
        size += len(document)
    if batch:
        yield batch


def _encode(batch: list[Document], tokenizer: Any) -> list[Tokens]:
    texts = [document for document in batch if isinstance(document, str)]
    if sum(map(len, texts)) > MOST_CHARACTERS:
        require_memory(
            BYTES_PER_CHARACTER * len(texts[0]),
            f"tokenising a document of {counted(len(texts[0]), 'character')}",
            "split it into several, such as the lines of a .jsonl file",
        )
    encoded = iter(token_ids(tokenizer, texts, "document") if texts else ())
    return [
        np.asarray(next(encoded), np.uint32) if isinstance(document, str) else document
        for document in batch
    ]
