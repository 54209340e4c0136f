"""Record of a shard, which vouches for it: written when all that the record names is durable."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsae.base.files import seal, write_durably
from mlsae.store.format.moments import GroupMoments, to_bytes
from mlsae.store.plan import Plan
from mlsae.store.read.records import CommitRecord, Producer
from mlsae.store.schema import commit_record, shard_moments


def commit_shard(
    path: Path,
    plan: Plan,
    shard: int,
    objects: Mapping[str, str],
    moments: Mapping[str, GroupMoments],
    producer: Producer | None,
    added_fvu: Mapping[str, Any] | None,
) -> None:
    """Record a shard whose objects (path → SHA-256) are durable; its moments go first."""
    data = to_bytes(moments)
    write_durably(path / shard_moments(shard), data)
    record = CommitRecord(
        plan_id=plan.id,
        shard=shard,
        objects=objects,
        moments_sha256=hashlib.sha256(data).hexdigest(),
        producer=producer,
        added_fvu=added_fvu,
    )
    write_durably(path / commit_record(shard), seal(record.to_json()))
