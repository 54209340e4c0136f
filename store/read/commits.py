"""All commit records of a store: pending shards, producers, FVU that the encoding adds."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlsae.base.files import canonical_json
from mlsae.store.errors import MixedProducersError
from mlsae.store.places.objects import Objects
from mlsae.store.plan import Plan
from mlsae.store.read.records import Producer, read_commit
from mlsae.store.schema import COMPLETE, commit_record


def pending_shards(objects: Objects, plan: Plan) -> list[int]:
    """Shards without a commit record by now."""
    return [s for s in range(plan.num_shards) if not objects.exists(commit_record(s))]


def store_id_of(plan_id: str, objects: Mapping[str, str]) -> str:
    """SHA-256 of the canonical JSON of [plan_id, [[path, SHA-256] … sorted]], hex."""
    return hashlib.sha256(canonical_json([plan_id, sorted(objects.items())])).hexdigest()


class Producers:
    """The producers that the commit records of a store name, each record read once.

    Args:
        objects: objects of the store.
        plan: plan of the store.
    """

    def __init__(self, objects: Objects, plan: Plan) -> None:
        self._objects = objects
        self._plan_id = plan.id
        self._unread = set(range(plan.num_shards))
        self._found: dict[str, list[int]] = {}

    def by_shard(self) -> list[tuple[Producer | None, list[int]]]:
        """(producer, shards that it committed) for all that are committed by now."""
        for shard in sorted(self._unread):
            try:
                record = read_commit(self._objects, self._plan_id, shard)
            except FileNotFoundError:
                continue
            self._unread.remove(shard)
            self._found.setdefault(_text(record.producer), []).append(shard)
        return [(json.loads(text), sorted(shards)) for text, shards in self._found.items()]

    def require_one(self, producer: Producer | None) -> None:
        """Refuse to add to shards that another producer made; a complete store is left alone.

        Raises:
            MixedProducersError: naming both, and the flag that allows it.
        """
        if self._objects.exists(COMPLETE):
            return
        for other, shards in self.by_shard():
            if _text(other) != _text(producer):
                raise MixedProducersError(
                    f"{self._objects.place}: shard {shards[0]} was made by "
                    f"{describe_producer(other)}, this process is {describe_producer(producer)}, "
                    f"and the last bits of their values may differ; go on with the same device and "
                    f"versions, or allow it with --allow-mixed-hardware"
                )


def describe_producer(producer: Producer | None) -> str:
    """`device cpu, torch 2.8.0` and the like."""
    if producer is None:
        return "(not recorded)"
    return ", ".join(f"{key} {producer[key]}" for key in sorted(producer))


def _text(producer: Producer | None) -> str:
    return canonical_json(producer).decode()


@dataclass(frozen=True, kw_only=True)
class LargestAddedFVU:
    """The largest added FVU over the shards of a store."""

    total: float
    """Over all the rows that were looked at in a shard."""
    site: str
    """Where `total` was found."""
    layer: int
    shard: int
    decile: float | None
    """Over a decile of row norm; None where no decile has any variance."""


def largest_added_fvu(objects: Objects, plan: Plan) -> LargestAddedFVU | None:
    """The largest over all shards that are committed by now; None where none was measured.

    Raises:
        DamagedStoreError, InvalidStoreError: a record is damaged or ill-formed.
    """
    found = [
        cost for shard in range(plan.num_shards) for cost in _of_shard(objects, plan.id, shard)
    ]
    if not found:
        return None
    largest = max(found, key=lambda cost: cost.total)
    return LargestAddedFVU(
        total=largest.total,
        site=largest.site,
        layer=largest.layer,
        shard=largest.shard,
        decile=max((cost.decile for cost in found if cost.decile is not None), default=None),
    )


def _of_shard(objects: Objects, plan_id: str, shard: int) -> Iterator[LargestAddedFVU]:
    try:
        added = read_commit(objects, plan_id, shard).added_fvu
    except FileNotFoundError:
        return
    for site, layers in (added or {}).items():
        for layer, measured in layers.items():
            if measured["total"] is not None:
                deciles = [float(value) for value in measured["by_decile"] if value is not None]
                yield LargestAddedFVU(
                    total=float(measured["total"]),
                    site=site,
                    layer=int(layer),
                    shard=shard,
                    decile=max(deciles, default=None),
                )
