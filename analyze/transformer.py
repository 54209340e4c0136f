"""The transformer behind a store, rebuilt as it was, or why there is none."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.base.errors import InputError
from mlsae.models import Transformer, load_for
from mlsae.models.families.kinds import ENCODER
from mlsae.models.sites import check_sites
from mlsae.models.source.tokenizer import load_tokenizer, texts_of_tokens, tokenizer_sha256
from mlsae.store import AnyStore, RemoteError, Store

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


def find_transformer(
    store: AnyStore, site: str, given: Path | None, device: torch.device
) -> tuple[Transformer | None, str | None]:
    """The transformer that predicts next tokens and whose activations a store holds.

    Args:
        store: the store.
        site: the site that will be spliced.
        given: directory of the model; None for where a store's last harvest found it.
        device: where to put the weights.

    Returns:
        The transformer, in the initialisation that the store records; or None and the reason.

    Raises:
        InputError: `given` is not None and cannot be used.
    """
    if (reason := _why_none(store.source.get("model"))) is not None:
        if given is not None:
            raise InputError(f"--model {given}: {reason}; leave it out")
        return None, reason
    if given is not None:
        return _load(store, site, (given, None), device), None
    places, reason = find_places(store)
    for place in places:
        try:
            return _load(store, site, place, device), None
        except InputError as error:
            reason = str(error)
    return None, reason


def place_of_transformer(store: AnyStore) -> str | None:
    """Name or directory under which a harvest of the store found its transformer, if known."""
    places, _ = find_places(store)
    return str(places[0][0]) if places else None


def find_pieces(store: AnyStore, given: Path | None) -> tuple[Pieces | None, str | None]:
    """Find the function that gives tokens their text, or None and the reason.

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


def _load(store: AnyStore, site: str, place: Place, device: torch.device) -> Transformer:
    name, revision = place
    transformer = load_for(store.source["model"], name, revision=revision, device=device)
    check_sites(transformer, [site])
    return transformer


def _why_none(record: object) -> str | None:
    if not isinstance(record, Mapping):
        return "the store records no transformer"
    if missing := sorted(_NEEDED - record.keys()):
        return f"the store's record of its transformer lacks {', '.join(missing)}"
    if record["kind"] == ENCODER:
        return "the store's transformer is an encoder, which predicts no next token"
    return None


def find_places(store: AnyStore) -> tuple[list[Place], str]:
    """Where harvests found the transformer, each place once, or why none is known."""
    places: dict[Place, None] = {}
    reason = "the store does not say where its transformer lay; give --model"
    for member in store.stores:
        try:
            if (place := _place(member)) is not None:
                places[place] = None
        except RemoteError as error:
            reason = f"where the transformer lay is not known ({error}); give --model"
    return list(places), reason


def _place(store: Store) -> Place | None:
    """Name and revision under which the last harvest of this store found its transformer."""
    places = [record["model"] for record in store.provenance() if "model" in record]
    return (places[-1]["name"], places[-1]["revision"]) if places else None


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
