"""Completing a store: its moments merged, its card, and the record that vouches for the whole."""

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlsae.base.files import DamagedFileError, read_sealed, seal, write_durably
from mlsae.store.errors import DamagedStoreError
from mlsae.store.format.moments import GroupMoments, from_bytes, to_bytes
from mlsae.store.places.objects import LocalObjects, Objects
from mlsae.store.plan import Plan
from mlsae.store.read.commits import largest_added_fvu, store_id_of
from mlsae.store.read.records import Completion, read_commit, read_setup
from mlsae.store.schema import (
    CARD,
    COMMITS,
    COMPLETE,
    MOMENTS,
    PROVENANCE,
    commit_record,
    shard_moments,
)
from mlsae.store.write.card import MARK, MAX_CARD_BYTES, card_of


def complete(path: Path, plan: Plan) -> None:
    """Merge the moments, write the card, and the record that makes the store complete.

    Every process that finds all shards committed may do so: the bytes are the same.

    Raises:
        DamagedStoreError: a shard's moments are not those that its record names, or an object that
            a record names is missing.
    """
    present = LocalObjects(path)
    objects = dict(read_setup(present, plan.id).objects)
    total = {site: GroupMoments(plan.layers, plan.d_model) for site in plan.sites}
    for shard in range(plan.num_shards):
        record = read_commit(present, plan.id, shard)
        objects.update(record.objects)
        data = (path / shard_moments(shard)).read_bytes()
        if hashlib.sha256(data).hexdigest() != record.moments_sha256:
            raise DamagedStoreError(
                f"{path / shard_moments(shard)} is damaged: its hash is not the one its commit "
                f"record names; delete {commit_record(shard)} and run the harvest again"
            )
        for site, moments in from_bytes(data, plan.sites, plan.layers, plan.d_model).items():
            total[site].merge(moments)
    data = to_bytes(total)
    write_durably(path / MOMENTS, data)
    store_id = store_id_of(plan.id, objects)
    card = make_card(path, plan, store_id, objects)
    if not has_foreign_card(present):
        write_durably(path / CARD, card)
    completion = Completion(
        plan_id=plan.id,
        store_id=store_id,
        num_shards=plan.num_shards,
        moments_sha256=hashlib.sha256(data).hexdigest(),
    )
    write_durably(path / COMPLETE, seal(completion.to_json()))


def make_card(path: Path, plan: Plan, store_id: str, names: Iterable[str]) -> bytes:
    """Make the card of a store in a directory from its records and provenance.

    Args:
        path: the directory; all of the store is there but the card and `complete.json`.
        plan: plan of the store.
        store_id: `store_id` of the store.
        names: names of the objects that decide `store_id`.

    Raises:
        DamagedStoreError: one of them is missing.
    """
    return card_of(
        plan,
        store_id=store_id,
        num_bytes=_num_bytes(path, names),
        cost=largest_added_fvu(LocalObjects(path), plan),
        provenance=_provenance(path),
    )


def has_foreign_card(objects: Objects) -> bool:
    """True if the owner of a store has put a README.md there that is not ours."""
    try:
        return MARK not in objects.read(CARD, MAX_CARD_BYTES)
    except FileNotFoundError:
        return False
    except DamagedStoreError:  # Longer than any card.
        return True


def _num_bytes(path: Path, names: Iterable[str]) -> int:
    try:
        return sum((path / name).stat().st_size for name in names)
    except FileNotFoundError as error:
        raise DamagedStoreError(
            f"{error.filename} is missing, but a record in {path / COMMITS} names it; restore it "
            f"from a copy, or delete that record and run the harvest again",
            rule="R-COMMIT-4",
        ) from None


def _provenance(path: Path) -> list[dict[str, Any]]:
    """Records of the runs, oldest first; a damaged one is left to `verify`."""
    found = []
    for file in sorted((path / PROVENANCE).glob("*.json")):
        with suppress(DamagedFileError):
            found.append(read_sealed(file))
    return sorted(found, key=lambda record: str(record.get("started", "")))
