"""What vouches for a store: a record for each shard, and one for the whole."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsae.base.files import canonical_json, seal, write_durably
from mlsae.store.errors import DamagedStoreError
from mlsae.store.moments import GroupMoments, from_bytes, to_bytes
from mlsae.store.objects import LocalObjects, Objects
from mlsae.store.plan import plan_id_of
from mlsae.store.records import read_commit, read_setup
from mlsae.store.rows import num_rows_of
from mlsae.store.schema import COMPLETE, MOMENTS, commit_record, shard_moments


def num_shards_of(plan: Mapping[str, Any]) -> int:
    """Shards of every activation array."""
    return -(-num_rows_of(plan) // int(plan["shard_rows"]))


def pending_shards(objects: Objects, plan: Mapping[str, Any]) -> list[int]:
    """Shards without a commit record by now."""
    return [s for s in range(num_shards_of(plan)) if not objects.exists(commit_record(s))]


def commit_shard(
    path: Path,
    plan: Mapping[str, Any],
    shard: int,
    objects: Mapping[str, str],
    moments: Mapping[str, GroupMoments],
    producer: Mapping[str, Any] | None,
    added_fvu: Mapping[str, Any] | None,
) -> None:
    """Record a shard whose objects (path → SHA-256) are durable; its moments go first."""
    data = to_bytes(moments)
    write_durably(path / shard_moments(shard), data)
    record = {
        "plan_id": plan_id_of(plan),
        "shard": shard,
        "objects": dict(objects),
        "moments_sha256": hashlib.sha256(data).hexdigest(),
        "producer": None if producer is None else dict(producer),
        "added_fvu": None if added_fvu is None else dict(added_fvu),
    }
    write_durably(path / commit_record(shard), seal(record))


def store_id_of(plan_id: str, objects: Mapping[str, str]) -> str:
    """SHA-256 of the canonical JSON of [plan_id, [[path, SHA-256] … sorted]], hex."""
    return hashlib.sha256(canonical_json([plan_id, sorted(objects.items())])).hexdigest()


def complete(path: Path, plan: Mapping[str, Any]) -> None:
    """Merge the moments, compute `store_id` and write the record that makes the store complete.

    Every process that finds all shards committed may do so: the bytes are the same.

    Raises:
        DamagedStoreError: a shard's moments are not those that its record names.
    """
    plan_id = plan_id_of(plan)
    present = LocalObjects(path)
    objects: dict[str, str] = dict(read_setup(present, plan_id)["objects"])
    layers = tuple(plan["layers"])
    total = {site: GroupMoments(layers, plan["d_model"]) for site in plan["sites"]}
    for shard in range(num_shards_of(plan)):
        record = read_commit(present, plan_id, shard)
        objects.update(record["objects"])
        data = (path / shard_moments(shard)).read_bytes()
        if hashlib.sha256(data).hexdigest() != record["moments_sha256"]:
            raise DamagedStoreError(
                f"{path / shard_moments(shard)} is damaged: its hash is not the one its commit "
                f"record names; delete {commit_record(shard)} and run the harvest again"
            )
        for site, moments in from_bytes(data, plan["sites"], layers, plan["d_model"]).items():
            total[site].merge(moments)
    data = to_bytes(total)
    write_durably(path / MOMENTS, data)
    record = {
        "plan_id": plan_id,
        "store_id": store_id_of(plan_id, objects),
        "num_shards": num_shards_of(plan),
        "moments_sha256": hashlib.sha256(data).hexdigest(),
    }
    write_durably(path / COMPLETE, seal(record))
