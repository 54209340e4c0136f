"""Which stores may be read as one: those of one model, cut alike, over different text."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlsae.base.errors import InputError
from mlsae.store.reader import Store

_DIGEST = 64


def check_together(stores: Sequence[Store]) -> None:
    """Refuse stores that are no one corpus.

    They must agree in what the producer recorded of the model, the tokenizer and the packing, and
    in sites, layers, width, context length, rows of a sequence and encoding. Whatever does not
    change what a row is (chunks, shards, compression, which positions are kept) may differ.

    Raises:
        InputError: two differ, naming in what, or hold the same text.
    """
    first, *others = stores
    ours = _facts(first)
    for other in others:
        theirs = _facts(other)
        differences = [
            f"{name} {_text(ours.get(name))} and {_text(theirs.get(name))}"
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]
        if differences:
            raise InputError(
                f"{first.place} and {other.place} are no one corpus: {'; '.join(differences)}. "
                f"Give stores of one model and the same sites and layers, over different text"
            )
    by_text: dict[str, Store] = {}
    for store in stores:
        before = by_text.setdefault(store.plan["tokens_sha256"], store)
        if before is not store:
            raise InputError(
                f"{before.place} and {store.place} hold the same text: give one of them"
            )


def _facts(store: Store) -> dict[str, Any]:
    """What stores of one corpus have in common; by name, as messages say it."""
    return {
        **_entries("model", store.source.get("model")),
        "sites": sorted(store.sites),
        "layers": list(store.layers),
        "d_model": store.d_model,
        "context_length": store.context_length,
        "rows of a sequence": store.rows_per_sequence,
        "encoding": store.encoding,
        "tokenizer_sha256": store.source.get("tokenizer_sha256"),
        **_entries("packing", store.source.get("packing")),
    }


def _entries(name: str, record: object) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        return {name: record}
    return {f"{name} {key}": value for key, value in record.items()}


def _text(value: object) -> str:
    if value is None:
        return "(none)"
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    text = str(value)
    return text[:12] if len(text) == _DIGEST else text
