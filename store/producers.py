"""Which hardware and versions made the shards: one kind, unless the user allows a mixture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsae.base.files import DamagedFileError, canonical_json, read_sealed
from mlsae.store.commit import num_shards_of
from mlsae.store.errors import DamagedStoreError, MixedProducersError
from mlsae.store.schema import COMPLETE, commit_record

Producer = Mapping[str, Any]


class Producers:
    """The producers that the commit records of a store name, each record read once.

    Args:
        path: the store.
        plan: its plan.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        self._path = path
        self._unread = set(range(num_shards_of(plan)))
        self._found: dict[str, list[int]] = {}

    def by_shard(self) -> list[tuple[Producer | None, list[int]]]:
        """(producer, shards that it committed) for all that are committed by now."""
        for shard in sorted(self._unread):
            path = self._path / commit_record(shard)
            try:
                record = read_sealed(path)
            except FileNotFoundError:
                continue
            except DamagedFileError as error:
                raise DamagedStoreError(str(error)) from None
            self._unread.remove(shard)
            self._found.setdefault(_text(record.get("producer")), []).append(shard)
        return [(json.loads(text), sorted(shards)) for text, shards in self._found.items()]

    def require_one(self, producer: Producer | None) -> None:
        """Refuse to add to shards that another producer made; a complete store is left alone.

        Raises:
            MixedProducersError: naming both, and the flag that allows it.
        """
        if (self._path / COMPLETE).exists():
            return
        for other, shards in self.by_shard():
            if _text(other) != _text(producer):
                raise MixedProducersError(
                    f"{self._path}: shard {shards[0]} was made by {describe(other)}, this process "
                    f"is {describe(producer)}, and the last bits of their values may differ; go on "
                    f"with the same device and versions, or allow it with --allow-mixed-hardware"
                )


def describe(producer: Producer | None) -> str:
    """`device cpu, torch 2.8.0` and the like."""
    if producer is None:
        return "(not recorded)"
    return ", ".join(f"{key} {producer[key]}" for key in sorted(producer))


def _text(producer: Producer | None) -> str:
    return canonical_json(producer).decode()
