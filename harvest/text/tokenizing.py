"""Texts to token ids: in large batches, on all cores, while the next batch is read.

A tokenizer written in Rust spreads a batch over the cores by itself (RAYON_NUM_THREADS limits it)
and frees Python meanwhile. One written in Python, which few models have, works on one core: copies
of it in processes of their own would start the calling program anew in each.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mlsae.base.errors import InputError
from mlsae.base.machine.resources import require_memory
from mlsae.base.units import counted
from mlsae.harvest.text.sequences import Tokens
from mlsae.harvest.text.sources import Document

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
    encoded = iter(_token_ids(texts, tokenizer) if texts else ())
    return [
        np.asarray(next(encoded), np.uint32) if isinstance(document, str) else document
        for document in batch
    ]


def _token_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    try:
        return _ids_of(texts, tokenizer)
    except BaseException as error:
        _require_failure(error)
        for text in texts:
            _check_unicode(text)
            try:
                _ids_of([text], tokenizer)
            except BaseException as alone:
                _require_failure(alone)
                raise InputError(_failed(tokenizer, alone, text)) from error
        raise InputError(_failed(tokenizer, error, texts[0])) from error


def _ids_of(texts: list[str], tokenizer: Any) -> list[list[int]]:
    # `verbose` off: texts longer than the model's context are the rule here.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False, return_attention_mask=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _require_failure(error: BaseException) -> None:
    """Pass on what is no failure of a tokenizer; a panic of one in Rust is no `Exception`."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _failed(tokenizer: Any, error: BaseException, text: str) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"the tokenizer {tokenizer.name_or_path} fails on a document that begins {text[:40]!r}: "
        f"{reason}; leave the document out, or mend the tokenizer"
    )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a document is not valid Unicode: {text[error.start]!r} after "
            f"{text[max(error.start - 40, 0) : error.start]!r}; repair it or leave it out"
        ) from error
