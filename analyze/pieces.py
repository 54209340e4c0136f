"""The text of single tokens."""

from collections.abc import Iterable
from typing import Any


def token_pieces(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """What each token stands for inside a text, with its leading space.

    Tokenizers of words drop the space of a text's first token, so each token is decoded behind
    another. A token that is a part of a character is `�`.

    Args:
        tokenizer: a transformers tokenizer.
        ids: token ids, in any order.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before = _decoded(tokenizer, anchor)
    known: dict[int, str] = {}
    pieces = []
    for token in ids:
        if token not in known:
            known[token] = _decoded(tokenizer, [*anchor, token]).removeprefix(before)
        pieces.append(known[token])
    return pieces


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
