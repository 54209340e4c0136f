"""Which hardware and versions made the shards: one kind, unless the user allows a mixture."""

import json
from collections.abc import Mapping
from typing import Any

from mlsae.base.files import canonical_json
from mlsae.store.errors import MixedProducersError
from mlsae.store.places.objects import Objects
from mlsae.store.plan import plan_id_of
from mlsae.store.read.records import read_commit
from mlsae.store.schema import COMPLETE
from mlsae.store.write.commit import num_shards_of

Producer = Mapping[str, Any]


class Producers:
    """The producers that the commit records of a store name, each record read once.

    Args:
        objects: of the store.
        plan: its plan.
    """

    def __init__(self, objects: Objects, plan: Mapping[str, Any]) -> None:
        self._objects = objects
        self._plan_id = plan_id_of(plan)
        self._unread = set(range(num_shards_of(plan)))
        self._found: dict[str, list[int]] = {}

    def by_shard(self) -> list[tuple[Producer | None, list[int]]]:
        """(producer, shards that it committed) for all that are committed by now."""
        for shard in sorted(self._unread):
            try:
                record = read_commit(self._objects, self._plan_id, shard)
            except FileNotFoundError:
                continue
            self._unread.remove(shard)
            self._found.setdefault(_text(record.get("producer")), []).append(shard)
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
                    f"{self._objects.place}: shard {shards[0]} was made by {describe(other)}, "
                    f"this process is {describe(producer)}, and the last bits of their values may "
                    f"differ; go on with the same device and versions, or allow it with "
                    f"--allow-mixed-hardware"
                )


def describe(producer: Producer | None) -> str:
    """`device cpu, torch 2.8.0` and the like."""
    if producer is None:
        return "(not recorded)"
    return ", ".join(f"{key} {producer[key]}" for key in sorted(producer))


def _text(producer: Producer | None) -> str:
    return canonical_json(producer).decode()
