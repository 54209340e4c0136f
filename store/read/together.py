"""Stores that may be read as one: of one model, cut alike, over different text."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import inf
from typing import Any

from mlsae.base.errors import InputError
from mlsae.store.read.store import Store

_DIGEST = 64


def check_together(stores: Sequence[Store]) -> None:
    """Refuse stores that cannot be read as one.

    They must agree in the producer's records of the model, the tokenizer and the packing, and
    in sites, layers, width, context length, rows of a sequence and encoding. Chunks,
    shards, compression and kept positions, which do not change a row, may differ.

    Raises:
        InputError: two differ, naming the difference, or have text in common by their plans.
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
                f"{first.place} and {other.place} cannot be read as one: {'; '.join(differences)}. "
                f"Give stores of one model and the same sites and layers, over different text"
            )
    for one, other in combinations(stores, 2):
        if one.plan.tokens_sha256 == other.plan.tokens_sha256:
            raise InputError(f"{one.place} and {other.place} hold the same text: give one of them")
        ours, theirs = _texts(one), _texts(other)
        for store_id in ours.keys() & theirs.keys():
            if max(ours[store_id][0], theirs[store_id][0]) < min(
                ours[store_id][1], theirs[store_id][1]
            ):
                raise InputError(
                    f"{one.place} and {other.place} share text, that of store {store_id[:12]}, "
                    f"which they were copied from: give stores without a sequence in common"
                )


def _texts(store: Store) -> dict[str, tuple[float, float]]:
    """Id of this store and its ancestors → first sequence held here, and end."""
    first, end = 0.0, float(store.num_sequences)
    texts = {store.store_id: (first, end)}
    origin: object = store.plan.derived_from
    while isinstance(origin, Mapping) and isinstance(origin.get("store_id"), str):
        match origin.get("sequences"):
            case [int(start), int(_)]:
                first, end = first + start, end + start
            case _:  # Any of them.
                first, end = -inf, inf
        texts[origin["store_id"]] = (first, end)
        origin = origin.get("derived_from")
    return texts


def _facts(store: Store) -> dict[str, Any]:
    """Facts that stores of one corpus have in common, by the name that messages give them."""
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
