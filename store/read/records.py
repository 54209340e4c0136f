"""Reading the sealed records of a store, wherever it is; each is held against the specification."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from mlsae.base.files import DamagedFileError, parse_sealed
from mlsae.store.errors import DamagedStoreError, InvalidStoreError, NotAStoreError
from mlsae.store.places.objects import Objects
from mlsae.store.plan import Plan
from mlsae.store.plancheck import check_keys, check_plan, is_sha256
from mlsae.store.schema import COMPLETE, PLAN, SETUP, commit_record

MAX_RECORD_BYTES = 2**26
"""Most bytes of a record: no store within the other limits needs more."""
Producer = Mapping[str, Any]
"""Hardware and versions that made a shard: one kind a store, unless the user allows a mixture."""
_LAYER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, kw_only=True)
class _Record:
    """JSON object that vouches for other objects of a store."""

    plan_id: str
    """Id of the store's plan."""
    extensions: Mapping[str, Any] = field(default_factory=dict)
    """Keys of a later minor version that a reader may pass by."""

    @classmethod
    def keys(cls) -> frozenset[str]:
        """Keys that every reader understands."""
        return frozenset(entry.name for entry in fields(cls)) - {"extensions"}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The record of a JSON object that has all the keys."""
        known = cls.keys()
        return cls(
            **{name: record[name] for name in known},
            extensions={name: record[name] for name in record.keys() - known},
        )

    def to_json(self) -> dict[str, Any]:
        """JSON object of the record."""
        return {**self.extensions, **{name: getattr(self, name) for name in self.keys()}}


@dataclass(frozen=True, kw_only=True)
class SetupRecord(_Record):
    """`commits/setup.json`: all that is written before the first activation."""

    objects: Mapping[str, str]
    """Name → hex SHA-256, for each shard of the token and calibration arrays."""
    metadata: Mapping[str, str]
    """Name → hex SHA-256 of each zarr.json."""


@dataclass(frozen=True, kw_only=True)
class CommitRecord(_Record):
    """`commits/<shard>.json`: one shard of all activation arrays."""

    shard: int
    """Number of the shard."""
    objects: Mapping[str, str]
    """Name → hex SHA-256, for each object that holds the shard."""
    moments_sha256: str
    """Hex SHA-256 of the shard's moments."""
    producer: Producer | None
    """Hardware and versions that made the shard; None where they were not recorded."""
    added_fvu: Mapping[str, Mapping[str, Any]] | None
    """Site → layer (decimal) → FVU that the encoding adds to the shard; None if not measured."""


@dataclass(frozen=True, kw_only=True)
class Completion(_Record):
    """`complete.json`: the whole store."""

    store_id: str
    """Hex SHA-256 of the plan's id and all objects."""
    num_shards: int
    """Shards of every activation array."""
    moments_sha256: str
    """Hex SHA-256 of the store's moments."""


AnyRecord = TypeVar("AnyRecord", bound=_Record)


def read_sealed_object(objects: Objects, name: str) -> dict[str, Any]:
    """A sealed JSON object of a store, its seal taken off.

    Raises:
        FileNotFoundError: there is no such object.
        DamagedStoreError: the record differs from the one that was written.
    """
    data = objects.read(name, MAX_RECORD_BYTES)
    try:
        return parse_sealed(data, f"{objects.place}/{name}")
    except DamagedFileError as error:
        raise DamagedStoreError(str(error), rule="R-SEAL-1") from None


def read_plan(objects: Objects) -> Plan:
    """The plan of a store, held against the specification.

    Raises:
        NotAStoreError: there is no plan there.
        DamagedStoreError: the plan's bytes are not those that were written.
        SchemaVersionError: the plan is of a version that this package cannot read.
        InvalidStoreError: the plan breaks a rule.
    """
    place = objects.place
    try:
        record = read_sealed_object(objects, PLAN)
    except (FileNotFoundError, NotADirectoryError):
        if objects.is_local and not Path(place).exists():
            raise NotAStoreError(f"{place} does not exist; expected an activation store") from None
        if objects.exists(COMPLETE):
            raise DamagedStoreError(
                f"{place}: {PLAN} is missing; restore it from a copy", rule="R-PLAN-2"
            ) from None
        raise NotAStoreError(
            f"{place} is not an activation store: it has no {PLAN}; "
            f"give a directory that `mlsae harvest` or `mlsae.store.create` made"
        ) from None
    return check_plan(record, place)


def read_setup(objects: Objects, plan_id: str) -> SetupRecord:
    """Record of the objects written before the first activation.

    Raises:
        DamagedStoreError, InvalidStoreError: missing, damaged, of another plan, or ill-formed.
    """
    record = _read(objects, SETUP, SetupRecord, plan_id, "R-SETUP-1")
    for key, hashes in (("objects", record.objects), ("metadata", record.metadata)):
        _check_hashes(hashes, f"{objects.place}/{SETUP}: {key}", "R-SETUP-1")
    return record


def read_complete(objects: Objects, plan_id: str) -> Completion:
    """Record of the whole store.

    Raises:
        DamagedStoreError, InvalidStoreError: missing, damaged, of another plan, or ill-formed.
    """
    record = _read(objects, COMPLETE, Completion, plan_id, "R-COMPLETE-1")
    if not (is_sha256(record.store_id) and is_sha256(record.moments_sha256)):
        raise InvalidStoreError(
            f"{objects.place}/{COMPLETE}: store_id and moments_sha256 must be SHA-256",
            rule="R-COMPLETE-1",
        )
    return record


def read_commit(objects: Objects, plan_id: str, shard: int) -> CommitRecord:
    """Commit record of a shard.

    Raises:
        FileNotFoundError: the shard is not committed.
        DamagedStoreError, InvalidStoreError: damaged, of another plan or shard, or ill-formed.
    """
    name = commit_record(shard)
    found = read_sealed_object(objects, name)
    record = _checked(objects, name, found, CommitRecord, plan_id, "R-COMMIT-2")
    if type(record.shard) is not int or record.shard != shard:
        raise InvalidStoreError(
            f"{objects.place}/{name} is the record of another shard", rule="R-COMMIT-2"
        )
    _check_hashes(record.objects, f"{objects.place}/{name}: objects", "R-COMMIT-2")
    if not is_sha256(record.moments_sha256):
        raise InvalidStoreError(
            f"{objects.place}/{name}: moments_sha256 must be a SHA-256", rule="R-COMMIT-2"
        )
    if record.producer is not None and not isinstance(record.producer, Mapping):
        raise InvalidStoreError(
            f"{objects.place}/{name}: producer must be null or an object", rule="R-COMMIT-2"
        )
    if not _is_added_fvu(record.added_fvu):
        raise InvalidStoreError(
            f"{objects.place}/{name}: added_fvu must be null or map sites and layers to num_rows, "
            f"total and by_decile",
            rule="R-COMMIT-2",
        )
    return record


def _read(objects: Objects, name: str, kind: type[AnyRecord], plan_id: str, rule: str) -> AnyRecord:
    try:
        record = read_sealed_object(objects, name)
    except FileNotFoundError:
        raise DamagedStoreError(
            f"{objects.place}: {name} is missing; restore it from a copy", rule=rule
        ) from None
    return _checked(objects, name, record, kind, plan_id, rule)


def _checked(
    objects: Objects,
    name: str,
    record: Mapping[str, Any],
    kind: type[AnyRecord],
    plan_id: str,
    rule: str,
) -> AnyRecord:
    where = f"{objects.place}/{name}"
    check_keys(record, kind.keys(), where, rule)
    if record["plan_id"] != plan_id:
        raise InvalidStoreError(
            f"{where} belongs to another plan; restore the store from a copy", rule="R-PLAN-3"
        )
    return kind.from_json(record)


def _check_hashes(value: object, where: str, rule: str) -> None:
    if not isinstance(value, Mapping) or not all(is_sha256(digest) for digest in value.values()):
        raise InvalidStoreError(f"{where} must map names to SHA-256", rule=rule)


def _is_added_fvu(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and all(
        isinstance(layers, Mapping)
        and all(_LAYER.fullmatch(layer) and _is_measured(found) for layer, found in layers.items())
        for layers in value.values()
    )


def _is_measured(value: object) -> bool:
    if not isinstance(value, Mapping) or not {"num_rows", "total", "by_decile"} <= value.keys():
        return False
    deciles = value["by_decile"]
    return isinstance(deciles, list) and all(
        number is None or type(number) is float or (type(number) is int and number < 2**53)
        for number in (value["total"], *deciles)
    )
