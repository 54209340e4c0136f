"""Tokens that join, open, close and pad documents on their way to sequences."""

from dataclasses import dataclass
from typing import Any

from mlsae.base.errors import InputError

PACKINGS = ("concatenate", "document")
BOS = ("auto", "always", "never")


@dataclass(frozen=True, kw_only=True)
class Joints:
    """Tokens that join documents; with the documents, they decide every token."""

    eos: int | None
    """Token that closes every document that does not end with it already; the tokenizer's
    separator where it has no EOS (BERT)."""
    bos: int | None
    """Token that opens every document but the first; only where there is no `eos`."""
    opening: int | None
    """Token that opens every context: a sequence, or with `isolate_documents` a document's part
    of a sequence."""
    packing: str = "concatenate"
    """`concatenate` joins documents and cuts the stream; `document` gives each its sequence."""
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
        """Read the joints off a tokenizer: special tokens, and the token put before a plain text.

        Args:
            tokenizer: a transformers tokenizer. Where it has no BOS or EOS, its classification and
                separator tokens stand for them.
            packing: `concatenate` or `document`.
            bos: `auto` opens contexts with BOS where the tokenizer adds one by default, `always`
                anyway, `never` not, nor does it join documents by BOS.
            isolate_documents: attention stays inside documents.

        Raises:
            InputError: `bos` is `always` and the tokenizer has none.
        """
        closes = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
        opens = _first(tokenizer.bos_token_id, tokenizer.cls_token_id)
        if opens is None and bos == "always":
            raise InputError(
                f"--bos always needs a BOS token, and the tokenizer {tokenizer.name_or_path} has "
                "none; use --bos auto"
            )
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        by_default = opens is not None and tokenizer("a")["input_ids"][:1] == [opens] != plain[:1]
        opening = opens if bos == "always" or (bos == "auto" and by_default) else None
        # A context that a BOS opens needs no other one between it and the document before.
        joined = packing == "concatenate" and not (isolate_documents and opening is not None)
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
            "context_bos": self.opening,
            "isolate_documents": self.isolate_documents,
            "padding": self.padding,
        }


def _first(*ids: int | None) -> int | None:
    return next((token for token in ids if token is not None), None)
