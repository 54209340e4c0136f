"""What a store's commit records say that its encoding costs, in one figure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlsae.store.places.objects import Objects
from mlsae.store.plan import plan_id_of
from mlsae.store.read.records import read_commit
from mlsae.store.write.commit import num_shards_of


@dataclass(frozen=True, kw_only=True)
class EncodingCost:
    """The largest added FVU over the shards of a store."""

    total: float
    """Over all the rows that were looked at in a shard."""
    site: str
    """Where `total` was found."""
    layer: int
    shard: int
    decile: float | None
    """Over a decile of row norm; None where no decile has any variance."""


def largest_added_fvu(objects: Objects, plan: Mapping[str, Any]) -> EncodingCost | None:
    """The largest over all shards that are committed by now; None where none was measured.

    Raises:
        DamagedStoreError, InvalidStoreError: a record is damaged or ill-formed.
    """
    found = [
        cost
        for shard in range(num_shards_of(plan))
        for cost in _of_shard(objects, plan_id_of(plan), shard)
    ]
    if not found:
        return None
    largest = max(found, key=lambda cost: cost.total)
    return EncodingCost(
        total=largest.total,
        site=largest.site,
        layer=largest.layer,
        shard=largest.shard,
        decile=max((cost.decile for cost in found if cost.decile is not None), default=None),
    )


def _of_shard(objects: Objects, plan_id: str, shard: int) -> Iterator[EncodingCost]:
    try:
        added = read_commit(objects, plan_id, shard)["added_fvu"]
    except FileNotFoundError:
        return
    for site, layers in (added or {}).items():
        for layer, measured in layers.items():
            if measured["total"] is not None:
                deciles = [float(value) for value in measured["by_decile"] if value is not None]
                yield EncodingCost(
                    total=float(measured["total"]),
                    site=site,
                    layer=int(layer),
                    shard=shard,
                    decile=max(deciles, default=None),
                )
