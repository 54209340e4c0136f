"""An SAE and a store that go together, checked before any work."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlsae.base.errors import InputError
from mlsae.base.files import Location, sha256_file
from mlsae.sae import SAE
from mlsae.sae import load as load_sae
from mlsae.sae.directory import WEIGHTS
from mlsae.store import AnyStore, open_corpus

_NEEDED = frozenset(
    {"store_id", "model_fingerprint", "site", "layers", "skip_positions", "validation"}
)

_IMPORTED = "imported"
"""Key in the record of an SAE that another tool trained."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairing:
    """A store and an SAE that are analyzed together."""

    store: AnyStore
    """The store that is read, or several as one."""

    sae: SAE
    """The SAE, on `device`, in evaluation mode."""

    site: str
    """The site the SAE was trained on."""

    layers: tuple[int, ...]
    """The layers the SAE was trained on, all of them in the store."""

    skip_positions: int
    """Positions below this were not trained on and are not eligible."""

    validation: Mapping[str, Any]
    """The SAE's record of its validation split."""

    sae_sha256: str
    """SHA-256 over the SAE's weights file."""

    device: torch.device
    """Where the work is done."""

    notes: tuple[str, ...]
    """Notes on this pairing for the reader of a summary; one line each."""

    warnings: tuple[str, ...]
    """Some of `notes`: store and SAE may not be meant for each other."""


def pair(
    cache: Location | Iterable[Location],
    directory: Path,
    device: torch.device,
    *,
    cache_dir: Path | None = None,
    cache_bytes: int | None = None,
) -> Pairing:
    """Open a store and an SAE and see that the one was trained on activations like the other's.

    Args:
        cache: directory or URL of the store, or several.
        directory: the SAE's directory.
        device: where the work will be done.
        cache_dir: argument of `open_store`.
        cache_bytes: argument of `open_store`.

    Raises:
        InputError: width, site, layers or transformer differ; or either cannot be read.
    """
    store = open_corpus(cache, cache_dir=cache_dir, cache_bytes=cache_bytes)
    sae = load_sae(directory)
    training = sae.training_record
    if missing_keys := sorted(_NEEDED - training.keys()):
        options = " and ".join(f"--{key}" for key in missing_keys)
        remedy = "analyze an SAE that mlsae train made"
        raise InputError(
            f"the SAE {directory} does not say how it was trained: its training.json lacks "
            f"{', '.join(missing_keys)}; "
            f"{f'import it again with {options}' if _IMPORTED in training else remedy}"
        )
    site = str(training["site"])
    where = f"the SAE {directory} does not match the store {store.place}"
    if sae.config.d_in != store.d_model:
        raise InputError(
            f"{where}: the SAE's d_in is {sae.config.d_in}, the store's d_model {store.d_model}"
        )
    if site not in store.sites:
        raise InputError(
            f"{where}: the SAE was trained on site {site}, the store holds {', '.join(store.sites)}"
        )
    layers = tuple(int(layer) for layer in training["layers"])
    if missing := [layer for layer in layers if layer not in store.layers]:
        raise InputError(
            f"{where}: the SAE was trained on layers {_list(layers)}, of which the store lacks "
            f"{_list(missing)}; it holds {_list(store.layers)}"
        )
    theirs, ours = training["model_fingerprint"], fingerprint(store)
    if theirs != ours and not (theirs is None and _IMPORTED in training):
        raise InputError(
            f"{where}: the SAE was trained on activations of transformer {_short(theirs)}, the "
            f"store holds those of {_short(ours)} (fingerprints of their weights)"
        )
    warnings = tuple(_warnings(store, training))
    return Pairing(
        store=store,
        sae=sae.to(device).eval(),
        site=site,
        layers=layers,
        skip_positions=int(training["skip_positions"]),
        validation=training["validation"],
        sae_sha256=sha256_file(directory / WEIGHTS),
        device=device,
        notes=(*_notes(store), *warnings),
        warnings=warnings,
    )


def provenance_of(pairing: Pairing) -> dict[str, str]:
    """Ids for store and SAE, for every file made from this pairing."""
    return {
        "store_id": pairing.store.store_id,
        "plan_id": pairing.store.plan_id,
        "sae_sha256": pairing.sae_sha256,
    }


def fingerprint(store: AnyStore) -> str | None:
    """The fingerprint of the transformer whose activations a store holds, if it recorded one."""
    model = store.source.get("model")
    return model.get("fingerprint") if isinstance(model, Mapping) else None


def _notes(store: AnyStore) -> list[str]:
    if store.rows_per_sequence == store.context_length:
        return []
    return [
        f"the store keeps {store.rows_per_sequence} of the {store.context_length} positions of "
        f"each sequence, and the analysis covers these alone"
    ]


def _warnings(store: AnyStore, training: Mapping[str, Any]) -> list[str]:
    notes = []
    if imported := training.get(_IMPORTED):
        name = imported["model"] or "which it does not name"
        notes.append(
            f"the SAE was imported from {imported['source']}: that its transformer ({name}) is the "
            f"store's, and which text it was trained on, has not been checked"
        )
        return notes
    trained = {record["store_id"]: record["tokens_sha256"] for record in _stores_of(training)}
    here = {member.store_id: member.plan.tokens_sha256 for member in store.stores}
    if here.keys() != trained.keys():
        notes.append(f"the SAE was trained from {_ids(trained)} and is analyzed on {_ids(here)}")
    if others := [name for name in here.keys() - trained if here[name] not in trained.values()]:
        notes.append(
            f"the text of {_ids(others)} is not that of training: the rows evaluated there were "
            f"chosen as training would have chosen them; where the texts overlap, it may have "
            f"trained on them"
        )
    return notes


def _stores_of(training: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Id and text for each store that an SAE was trained from."""
    before_corpora = {
        "store_id": training["store_id"],
        "tokens_sha256": training["validation"].get("tokens_sha256"),
    }
    return list(training.get("stores", [before_corpora]))


def _ids(store_ids: Iterable[str]) -> str:
    ids = sorted(map(_short, store_ids))
    return f"store{'' if len(ids) == 1 else 's'} {', '.join(ids)}"


def _short(digest: object) -> str:
    return "that was not recorded" if digest is None else str(digest)[:12]


def _list(layers: tuple[int, ...] | list[int]) -> str:
    return ", ".join(str(layer) for layer in layers)
