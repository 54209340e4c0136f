"""The transformer behind a store, rebuilt as it was, or why there is none."""

from collections.abc import Mapping
from pathlib import Path

import torch

from mlsae.base.errors import InputError
from mlsae.models import Transformer, load_for
from mlsae.models.families.kinds import ENCODER
from mlsae.models.sites import check_sites
from mlsae.store import AnyStore, RemoteError, Store

Place = tuple[str | Path, str | None]
"""Name or directory, and revision."""
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
