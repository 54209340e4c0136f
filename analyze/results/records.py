"""Records of an events table: its plan, and each part, a Parquet file of some rows at a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from mlsae.base.errors import InputError
from mlsae.base.files import sha256_file, stand_in
from mlsae.base.units import counted, format_bytes


@dataclass(frozen=True, kw_only=True)
class ReadStore:
    """A store that the rows were read from."""

    store_id: str
    """Hex digest of the store's content."""

    num_sequences: int
    """Sequences in the store."""


@dataclass(frozen=True, kw_only=True)
class RecordedPlan:
    """Plan for a directory that `mlsae events` writes, as its first file records it."""

    kind: str
    """Directory kind."""

    tables_version: str
    """Version of the table's columns."""

    store_id: str
    """Hex digest over the store's content, or over several as one."""

    plan_id: str
    """Hex digest over the store's plan, or over several as one."""

    sae_sha256: str
    """Hex SHA-256 of the SAE's weights file."""

    cache: tuple[str, ...]
    """Each store's place; may differ when the work goes on."""

    sae: str
    """The SAE's place; may differ when the work goes on."""

    stores: tuple[ReadStore, ...]
    """Every store, in row order."""

    site: str
    """Site at which the activations were taken."""

    layers: tuple[int, ...]
    """Layer ids."""

    num_latents: int
    """Latents in the SAE."""

    skip_positions: int
    """Positions below this have no events."""

    context_length: int
    """Tokens per sequence."""

    rows_per_sequence: int
    """Rows per sequence at a layer."""

    num_sequences: int
    """Sequences that are read."""

    num_parts: int
    """Parts, over all layers."""

    notes: tuple[str, ...]
    """Notes on the store and the SAE for a reader, one line each."""

    settings: Mapping[str, Any]
    """Settings that decide the bytes, by name, beside the other fields in JSON."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """A plan read back; keys that are no field are settings.

        Raises:
            KeyError: a field is missing.
        """
        own = {field.name: content[field.name] for field in fields(cls) if field.name != _SETTINGS}
        own |= {name: tuple(own[name]) for name in ("cache", "layers", "notes")}
        own["stores"] = tuple(
            ReadStore(**{field.name: store[field.name] for field in fields(ReadStore)})
            for store in own["stores"]
        )
        return cls(**own, settings={key: content[key] for key in content.keys() - own.keys()})

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON, with lists for tuples.

        Raises:
            ValueError: a setting has a field's name.
        """
        own = {key: value for key, value in asdict(self).items() if key != _SETTINGS}
        if both := sorted(own.keys() & self.settings.keys()):
            raise ValueError(f"settings with names of fields of a plan: {', '.join(both)}")
        own = {key: list(of) if isinstance(of, tuple) else of for key, of in own.items()}
        return own | dict(self.settings)


_SETTINGS = "settings"


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """Record of a part that is written."""

    path: str
    """Path within the data set's folder: `layer-<l>/part-<first row>.parquet`."""

    num_events: int
    """Events in the part."""

    num_bytes: int
    """File size in bytes."""

    sha256: str
    """The file's hex SHA-256."""


def part_record(content: Mapping[str, Any]) -> PartRecord:
    """A record read back; keys that a later minor version added are left out."""
    return PartRecord(**{field.name: content[field.name] for field in fields(PartRecord)})


def totals_of(records: Sequence[PartRecord]) -> dict[str, Any]:
    """Events, bytes, bytes an event (null without events) and the records themselves."""
    num_events = sum(record.num_events for record in records)
    num_bytes = sum(record.num_bytes for record in records)
    return {
        "num_events": num_events,
        "num_bytes": num_bytes,
        "bytes_per_event": num_bytes / num_events if num_events else None,
        "parts": [asdict(record) for record in records],
    }


def describe(totals: Mapping[str, Any]) -> str:
    """Sums of `totals_of` in words."""
    each = totals["bytes_per_event"]
    return (
        f"{counted(totals['num_events'], 'event')} in {counted(len(totals['parts']), 'part')}, "
        f"{format_bytes(totals['num_bytes'])}"
        f"{'' if each is None else f', {each:.2f} bytes an event'}"
    )


def check_part(folder: Path, record: PartRecord, *, every_byte: bool) -> None:
    """Require that a part is there as it was written.

    Args:
        folder: the data set's folder.
        record: the part's record.
        every_byte: True reads the file; False looks at its size alone.

    Raises:
        InputError: the file is missing or differs.
    """
    path = folder / record.path
    remedy = "remove it if it is there and run the same command again"
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise InputError(f"{path} is missing; {remedy}")
    if size != record.num_bytes:
        if found := stand_in(path):
            raise InputError(f"{path} {found}, or {remedy}")
        raise InputError(
            f"{path} is damaged: it has {size} bytes, expected {record.num_bytes}; {remedy}"
        )
    if every_byte and (digest := sha256_file(path)) != record.sha256:
        raise InputError(
            f"{path} is damaged: its SHA-256 is {digest[:12]}…, expected {record.sha256[:12]}…; "
            f"{remedy}"
        )
