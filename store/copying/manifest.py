"""Objects of an exact copy, each with the SHA-256 that a record names."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlsae.base.files import seal
from mlsae.store.errors import DamagedStoreError, InvalidStoreError, RemoteError, StoreError
from mlsae.store.read.commits import store_id_of
from mlsae.store.read.records import CommitRecord, read_commit, read_complete, read_setup
from mlsae.store.read.store import Store
from mlsae.store.schema import (
    ARRAY_METADATA,
    COMPLETE,
    MOMENTS,
    SETUP,
    commit_record,
    shard_moments,
)

_REQUESTS = 16
"""Records asked for at once."""


@dataclass(frozen=True)
class Item:
    """An object that a record vouches for."""

    name: str
    sha256: str
    record: str
    """The record, for messages."""


class Manifest:
    """The objects of a complete store.

    Args:
        store: open, complete.

    Raises:
        DamagedStoreError, InvalidStoreError: its records are damaged or do not fit one another.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.num_shards = store.plan.num_shards
        setup = read_setup(store.objects, store.plan_id)
        complete = read_complete(store.objects, store.plan_id)
        self.plan_record = seal(store.plan.to_json())
        self.setup_record = seal(setup.to_json())
        self.complete_record = seal(complete.to_json())
        self.setup = [
            Item(name, digest, SETUP)
            for hashes in (setup.metadata, setup.objects)
            for name, digest in hashes.items()
        ]
        self.remade: dict[str, bytes] = {}
        """Name → content of metadata that were added to in the store, as they were recorded."""
        if store.is_consolidated:
            data = store.plan.metadata()[ARRAY_METADATA]
            if sha256(data) == setup.metadata[ARRAY_METADATA]:
                self.remade[ARRAY_METADATA] = data
                self.setup = [item for item in self.setup if item.name != ARRAY_METADATA]
        self.moments = Item(MOMENTS, complete.moments_sha256, COMPLETE)
        self.commit_sha256 = self._check_shards(setup.objects)
        """SHA-256 of each shard's commit record."""

    def shard(self, shard: int) -> tuple[list[Item], bytes]:
        """The objects and moments of a shard, and its commit record.

        Raises:
            DamagedStoreError: the record has changed.
        """
        try:
            record = self._read(shard)
            data = seal(record.to_json())
        except StoreError:
            data = b""
        if sha256(data) != self.commit_sha256[shard]:
            raise DamagedStoreError(
                f"{self.store.place}/{commit_record(shard)} changed while the store was copied; if "
                f"that was meant, give another place and copy again"
            )
        where = f"the record of shard {shard}"
        items = [Item(key, digest, where) for key, digest in record.objects.items()]
        return [*items, Item(shard_moments(shard), record.moments_sha256, where)], data

    def sizes(self) -> dict[str, int]:
        """Name → bytes of every object but records.

        A place that lists nothing is asked for the sizes of the first shard alone: those of the
        others are taken to be the same.

        Raises:
            DamagedStoreError: an object is not there.
        """
        objects = self.store.objects
        shared = [item.name for item in (*self.setup, self.moments)]
        shards = [self.names(shard) for shard in range(self.num_shards)]
        every = [*shared, *(name for names in shards for name in names)]
        try:
            if objects.is_local:
                return {name: (Path(objects.place) / name).stat().st_size for name in every}
            with suppress(RemoteError):
                listed = dict(objects.walk())
                return {name: listed[name] for name in every}
            asked = [*shared, *shards[0]]
            with ThreadPoolExecutor(_REQUESTS) as pool:
                found = dict(zip(asked, pool.map(objects.size, asked), strict=True))
        except FileNotFoundError as error:
            missing = error.filename
        except KeyError as error:
            missing = f"{self.store.place}/{error.args[0]}"
        else:
            for names in shards[1:]:
                found |= {name: found[first] for first, name in zip(shards[0], names, strict=True)}
            return found
        raise DamagedStoreError(
            f"{missing} is missing, but the store's records name it; restore it from a copy",
            rule="R-COMMIT-4",
        )

    def _check_shards(self, setup: Mapping[str, str]) -> list[str]:
        """SHA-256 of every commit record, once they are found to make up this store."""
        objects = dict(setup)
        digests = []
        with ThreadPoolExecutor(1 if self.store.is_local else _REQUESTS) as pool:
            for shard, record in enumerate(pool.map(self._read, range(self.num_shards))):
                if set(record.objects) != set(self.store.plan.shard_objects(shard)):
                    raise InvalidStoreError(
                        f"{self.store.place}/{commit_record(shard)} must name every object of its "
                        f"shard and no other",
                        rule="R-COMMIT-3",
                    )
                objects.update(record.objects)
                digests.append(sha256(seal(record.to_json())))
        if store_id_of(self.store.plan_id, objects) != self.store.store_id:
            raise InvalidStoreError(
                f"{self.store.place}: the store_id is not that of the recorded objects; restore it "
                f"from a copy",
                rule="R-COMPLETE-2",
            )
        return digests

    def _read(self, shard: int) -> CommitRecord:
        try:
            return read_commit(self.store.objects, self.store.plan_id, shard)
        except FileNotFoundError:
            raise DamagedStoreError(
                f"{self.store.place}: {commit_record(shard)} is missing; restore it from a copy",
                rule="R-COMMIT-1",
            ) from None

    def names(self, shard: int) -> list[str]:
        """Names of a shard's objects and moments, in the same order for each shard."""
        return [*self.store.plan.shard_objects(shard), shard_moments(shard)]

    def object_names(self) -> list[str]:
        """Names of all objects that decide the store_id."""
        plan = self.store.plan
        shards = range(plan.num_shards)
        return plan.setup_objects() + [name for s in shards for name in plan.shard_objects(s)]


def sha256(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()
