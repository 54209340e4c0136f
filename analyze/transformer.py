"""The transformer behind a store, rebuilt as it was, or why there is none."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.base.errors import InputError
from mlsae.base.output.console import Progress
from mlsae.store import AnyStore, RemoteError, Store

# Rooms of transformers are imported where one is wanted: that takes longer than a small analysis.
if TYPE_CHECKING:
    from mlsae.models import Transformer

Place = tuple[str | Path, str | None]
"""Name or directory, and revision."""
Pieces = Callable[[npt.NDArray[Any]], list[str]]
"""Token ids → the text of each."""
_NEEDED = frozenset(
    {
        "fingerprint",
        "config_sha256",
        "dtype",
        "attention_implementation",
        "kind",
        "init",
        "init_seed",
        "blocks",
    }
)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Places where the transformer of a store may lie."""

    each: tuple[Place, ...]
    """Places to be tried, in order."""

    is_given: bool
    """True where the only place is the user's, which must serve."""

    reason: str
    """Reason why no place is known, or not all of them."""

    tokenizers: tuple[str, ...] = ()
    """Places of tokenizers that the harvests were given beside their transformers."""

    @property
    def first(self) -> str | None:
        """Name or directory that is tried first; None where none is known."""
        return str(self.each[0][0]) if self.each else None


def find_places(store: AnyStore, given: Path | None) -> Places:
    """Find where the transformer of a store may lie.

    Args:
        store: the store.
        given: directory of the transformer; None for where a store's last harvest found it.
    """
    places: dict[Place, None] = {}
    tokenizers: dict[str, None] = {}
    reason = "the store does not say where its transformer lay; give --model"
    for member in store.stores:
        try:
            if (record := _last_record(member)) is not None:
                places[record["name"], record["revision"]] = None
                if "tokenizer" in record:
                    tokenizers[record["tokenizer"]] = None
        except RemoteError as error:
            reason = f"where the transformer lay is not known ({error}); give --model"
    if given is not None:
        places, reason = {(given, None): None}, ""
    return Places(
        each=tuple(places),
        is_given=given is not None,
        reason=reason,
        tokenizers=tuple(tokenizers),
    )


def find_transformer(
    store: AnyStore, site: str, places: Places, device: torch.device
) -> "tuple[Transformer | None, str | None]":
    """Load the transformer that predicts next tokens and whose activations a store holds.

    Args:
        store: the store.
        site: the site that will be spliced.
        places: where it may lie.
        device: where to put the weights.

    Returns:
        The transformer, in the initialisation that the store records; or None and the reason.

    Raises:
        InputError: the place is the user's and holds no such transformer.
    """
    if (reason := _why_none(store.source.get("model"))) is not None:
        if places.is_given:
            raise InputError(f"--model {places.first}: {reason}; leave it out")
        return None, reason
    reason = places.reason
    for place in places.each:
        try:
            with Progress("load the model", None, ""):
                return _load(store, site, place, places, device), None
        except InputError as error:
            if places.is_given:
                raise
            reason = str(error)
    return None, reason


def find_pieces(store: AnyStore, places: Places) -> tuple[Pieces | None, str | None]:
    """Find the function that gives tokens their text, or None and the reason.

    Args:
        store: the store.
        places: where the transformer may lie, and its tokenizer beside it.
    """
    reason = places.reason
    recorded = store.source.get("tokenizer_sha256")
    where = (*((name, None) for name in places.tokenizers), *places.each)
    if not where:
        return None, reason
    from mlsae.models.source.tokenizer import load_tokenizer, tokenizer_sha256

    for name, revision in where:
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


def _load(
    store: AnyStore, site: str, place: Place, places: Places, device: torch.device
) -> "Transformer":
    from mlsae.models import load_for
    from mlsae.models.sites import check_sites

    name, revision = place
    transformer = load_for(
        store.source["model"],
        name,
        revision=revision,
        device=device,
        tokenizer=next(iter(places.tokenizers), None),
    )
    if not transformer.predicts:
        raise InputError(
            f"model {name} was saved without its head and predicts no next token, so that "
            "cross-entropy cannot be measured"
        )
    check_sites(transformer, [site])
    return transformer


def _why_none(record: object) -> str | None:
    if not isinstance(record, Mapping):
        return "the store records no transformer"
    if missing := sorted(_NEEDED - record.keys()):
        return f"the store's record of its transformer lacks {', '.join(missing)}"
    from mlsae.models.families.kinds import ENCODER

    if record["kind"] == ENCODER:
        return "the store's transformer is an encoder, which predicts no next token"
    return None


def _last_record(store: Store) -> Mapping[str, Any] | None:
    """Places of transformer and tokenizer as the last harvest of this store found them."""
    records = [record["model"] for record in store.provenance() if "model" in record]
    return records[-1] if records else None


class NoTextError(InputError):
    """Tokens whose text a tokenizer does not give."""


class _Cached:
    """Decodes each token id once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, ids: npt.NDArray[Any]) -> list[str]:
        from mlsae.models.source.tokenizer import texts_of_tokens

        wanted: list[int] = ids.tolist()
        new = np.array([token for token in wanted if token not in self._known], dtype=np.int64)
        if len(new):
            try:
                texts = texts_of_tokens(self._tokenizer, new.tolist())
            except Exception as error:  # Tokenizers fail in ways of their own.
                cause = " ".join(f"{type(error).__name__}: {error}".split())
                raise NoTextError(f"the tokenizer cannot decode all tokens ({cause})") from error
            # Halves of characters may be no UTF-8.
            texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
            self._known.update(zip(new.tolist(), texts, strict=True))
        return [self._known[token] for token in wanted]
