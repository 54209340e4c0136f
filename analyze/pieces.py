"""The text of single tokens, by the tokenizer that made a store's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.analyze.transformer import find_places
from mlsae.base.errors import InputError
from mlsae.models.source.tokenizer import load_tokenizer, texts_of_tokens, tokenizer_sha256
from mlsae.store import AnyStore

Pieces = Callable[[npt.NDArray[Any]], list[str]]
"""Token ids → the text of each."""


def find_pieces(store: AnyStore, given: Path | None) -> tuple[Pieces | None, str | None]:
    """What gives tokens their text, or None and the reason.

    Args:
        store: the store.
        given: directory of the transformer; None for where a store's last harvest found it.
    """
    places, reason = ([(given, None)], "") if given is not None else find_places(store)
    recorded = store.source.get("tokenizer_sha256")
    for name, revision in places:
        try:
            tokenizer = load_tokenizer(name, revision=revision)
        except InputError as error:
            reason = str(error)
            continue
        if recorded is not None and tokenizer_sha256(tokenizer) != recorded:
            reason = f"the tokenizer of {name} is not the one that made the store's tokens"
            continue
        return _Cached(tokenizer), None
    return None, reason


class _Cached:
    """Decodes each token id once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, ids: npt.NDArray[Any]) -> list[str]:
        wanted: list[int] = ids.tolist()
        new = np.array([token for token in wanted if token not in self._known], dtype=np.int64)
        if len(new):
            texts = texts_of_tokens(self._tokenizer, new.tolist())
            self._known.update(zip(new.tolist(), texts, strict=True))
        return [self._known[token] for token in wanted]
