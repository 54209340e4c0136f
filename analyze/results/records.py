"""Records of the parts of a table of events: one Parquet file of some rows at a layer each."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlsae.base.errors import InputError
from mlsae.base.files import sha256_file
from mlsae.base.units import format_bytes, format_count


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """Record of a part that is written."""

    path: str
    """Path within the folder of the data set: `layer=<l>/part-<first row>.parquet`."""

    num_events: int
    """Number of events in the part."""

    num_bytes: int
    """Size of the file in bytes."""

    sha256: str
    """Hex SHA-256 of the file."""


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
    """The sums of `totals_of` in words."""
    each = totals["bytes_per_event"]
    return (
        f"{format_count(totals['num_events'])} events in {format_count(len(totals['parts']))} "
        f"parts, {format_bytes(totals['num_bytes'])}"
        f"{'' if each is None else f', {each:.2f} bytes an event'}"
    )


def check_part(folder: Path, record: PartRecord, *, every_byte: bool) -> None:
    """Require that a part is there as it was written.

    Args:
        folder: the folder of the data set.
        record: the record of the part.
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
        raise InputError(
            f"{path} is damaged: it has {size} bytes, expected {record.num_bytes}; {remedy}"
        )
    if every_byte and (digest := sha256_file(path)) != record.sha256:
        raise InputError(
            f"{path} is damaged: its SHA-256 is {digest[:12]}…, expected {record.sha256[:12]}…; "
            f"{remedy}"
        )
