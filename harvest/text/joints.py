"""Tokens that join, open, close and pad documents on their way to sequences."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlsae.base.errors import InputError

PACKINGS = ("auto", "concatenate", "document", "rows")
BOS = ("auto", "always", "never")


@dataclass(frozen=True, kw_only=True)
class Joints:
    """Tokens that join documents; with the documents, they decide every token."""

    eos: int | None
    """Token that closes every document that does not end with it already; the tokenizer's
    separator where it has no EOS (BERT)."""
    bos: int | None
    """Token that opens every document but the first; only where there is no `eos`."""
    opening: tuple[int, ...]
    """Tokens that open every context which does not begin with them already: a sequence, or with
    `isolate_documents` a document's part of a sequence."""
    packing: str = "concatenate"
    """`concatenate` joins documents and cuts the stream; `document` gives each its sequence;
    `rows` takes documents that are sequences already."""
    isolate_documents: bool = False
    """Attention stays inside documents, so that each is a context of its own."""
    padding: int | None = None
    """Token that fills a sequence up, with `document`."""

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        *,
        packing: str = "concatenate",
        bos: str = "auto",
        isolate_documents: bool = False,
    ) -> "Joints":
        """Read the joints off a tokenizer: special tokens, and those put before a plain text.

        Args:
            tokenizer: a transformers tokenizer. Where it has no BOS or EOS, its classification and
                separator tokens stand for them.
            packing: `concatenate`, `document` or `rows`, which has no joints.
            bos: `auto` opens contexts with the tokens that the tokenizer puts before a text,
                `always` with BOS where there are none, `never` not, nor does it join documents by
                BOS.
            isolate_documents: attention stays inside documents.

        Raises:
            InputError: `bos` is `always` and the tokenizer has none.
        """
        if packing == "rows":
            return cls(
                eos=None, bos=None, opening=(), packing=packing, isolate_documents=isolate_documents
            )
        closes = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
        opens = _first(tokenizer.bos_token_id, tokenizer.cls_token_id)
        before = _put_before(tokenizer, opens)
        if not before and opens is None and bos == "always":
            raise InputError(
                f"--bos always needs a BOS token, and the tokenizer {tokenizer.name_or_path} has "
                "none; use --bos auto"
            )
        if bos == "always" and opens is not None:
            before = before or (opens,)
        opening = before if bos != "never" else ()
        # A context that a BOS opens needs no other one between it and the document before.
        joined = packing == "concatenate" and not (isolate_documents and opening)
        return cls(
            eos=closes,
            bos=opens if closes is None and bos != "never" and joined else None,
            opening=opening,
            packing=packing,
            isolate_documents=isolate_documents,
            padding=_first(tokenizer.pad_token_id, closes, 0) if packing == "document" else None,
        )

    def describe(self) -> dict[str, Any]:
        """Entry `packing` of a store's source."""
        return {
            "packing": self.packing,
            "document_eos": self.eos,
            "document_bos": self.bos,
            "context_bos": list(self.opening) if len(self.opening) > 1 else _first(*self.opening),
            "isolate_documents": self.isolate_documents,
            "padding": self.padding,
        }


def _put_before(tokenizer: Any, opens: int | None) -> tuple[int, ...]:
    """Tokens that a tokenizer puts before a text: BOS, or others such as `[gMASK]<sop>`."""
    text = _known_text(tokenizer)
    whole: list[int] = list(tokenizer(text)["input_ids"])
    plain: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    # Some tokenizers put a BOS there whether asked to or not.
    body = plain[1:] if plain[:1] == [opens] else plain
    for start in range(len(whole) if body else 0):
        if whole[start : start + len(body)] == body:
            return tuple(whole[:start])
    return tuple(whole[:1]) if whole[:1] == [opens] and len(whole) > len(plain) else ()


def _known_text(tokenizer: Any) -> str:
    """Text that a tokenizer takes: a letter, else the first of its words, for some fail on others.

    Raises:
        InputError: the tokenizer fails on all of its words.
    """
    special = set(tokenizer.all_special_tokens)
    words: Iterator[str] = (word for word in tokenizer.get_vocab() if word not in special)
    for text in itertools.chain(("a",), words):
        try:
            tokenizer(text)
        except Exception:  # some know no letter
            continue
        return text
    raise InputError(
        f"the tokenizer {tokenizer.name_or_path} fails on every word of its own vocabulary; mend it"
    )


def _first(*ids: int | None) -> int | None:
    return next((token for token in ids if token is not None), None)
