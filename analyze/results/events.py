"""Opening the events of an analysis or of `mlsae events`, and reading one latent's."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pd
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from mlsae.analyze.results.directory import EVENTS_NAME, events_folder
from mlsae.analyze.results.events_directory import EventsDirectory
from mlsae.analyze.results.records import PartRecord, check_part, part_record
from mlsae.analyze.results.tables import with_later_columns
from mlsae.base.errors import InputError

_LAYER = re.compile(r"layer[-=](\d+)/")
"""Folder of a layer. Earlier versions wrote `layer=<l>`, of which other readers made a column."""


class HasEvents(Protocol):
    """An `Analysis` or `Events`."""

    @property
    def path(self) -> Path:
        """The directory."""

    @property
    def summary(self) -> Mapping[str, Any]:
        """With `layers`, `num_latents` and, under `events`, the parts."""

    @property
    def events(self) -> pd.Dataset:
        """The events."""


@dataclass(frozen=True, eq=False)
class Events:
    """A finished directory of `mlsae events`."""

    path: Path
    """Directory that was opened."""

    summary: Mapping[str, Any]
    """Settings and provenance and, under `events`, numbers of events and bytes and the parts."""

    events: pd.Dataset
    """One row an active latent of a row and layer, read as they are scanned."""


def load_events(directory: str | Path) -> Events:
    """Open a directory that `mlsae events` has finished.

    Raises:
        InputError: the directory is another one, unfinished or of another major version, or a part
            is missing or damaged.
    """
    of = EventsDirectory(Path(directory))
    plan, totals = of.plan(), of.totals()
    return Events(
        path=of.path,
        summary=plan.to_json() | {EVENTS_NAME: totals},
        events=open_events(of.path, totals),
    )


def open_events(directory: Path, totals: Mapping[str, Any]) -> pd.Dataset:
    """The events in `directory` as a data set, files by layer, then row.

    Args:
        directory: an analysis, or a directory of `mlsae events`.
        totals: a summary of the parts, as `totals_of` gives it.

    Raises:
        InputError: a part is missing, or its size is not the recorded one.
    """
    folder = events_folder(directory)
    records = records_of(totals)
    for record in records:
        check_part(folder, record, every_byte=False)
    by_place = sorted(records, key=lambda record: (len(record.path), record.path))
    files = [str(folder / record.path) for record in by_place]
    options = pd.ParquetFragmentScanOptions(page_checksum_verification=True)
    return pd.FileSystemDataset.from_paths(
        files,
        schema=with_later_columns("events", pq.read_schema(files[0])),
        format=pd.ParquetFileFormat(default_fragment_scan_options=options),
        filesystem=LocalFileSystem(),
        partitions=[_where(record.path) for record in by_place],
    )


def _where(path: str) -> pc.Expression:
    """Condition that holds for all events of a part."""
    found = _LAYER.match(path)
    return pc.scalar(True) if found is None else pc.field("layer") == int(found[1])


def records_of(totals: Mapping[str, Any]) -> list[PartRecord]:
    """Records of the parts that `totals_of` listed."""
    return [part_record(record) for record in totals["parts"]]


def latent_events(
    source: HasEvents, latent: int, *, layers: Sequence[int] | None = None
) -> pa.Table:
    """The events of one latent, by layer, then row.

    Each part of those layers is read in its footer and in the row groups that may hold the latent,
    at least one; every page that is read is checked.

    Args:
        source: an analysis, or a directory that `load_events` opened.
        latent: index of the latent.
        layers: layer ids; None for all.

    Raises:
        InputError: no such latent or layer, or a part is damaged.
    """
    known, num_latents = source.summary["layers"], source.summary["num_latents"]
    if not 0 <= latent < num_latents:
        raise InputError(
            f"there is no latent {latent}: the SAE of {source.path} has latents 0 to "
            f"{num_latents - 1}"
        )
    if missing := [layer for layer in layers or () if layer not in known]:
        raise InputError(
            f"there is no layer {missing[0]} in {source.path}; it has {', '.join(map(str, known))}"
        )
    wanted = pc.field("latent") == latent
    if layers is not None:
        wanted &= pc.field("layer").isin(list(layers))
    try:
        found = source.events.to_table(filter=wanted)
    except (OSError, pa.ArrowException) as error:
        for record in records_of(source.summary[EVENTS_NAME]):
            check_part(events_folder(source.path), record, every_byte=True)
        reason = str(error).splitlines()[0]
        raise InputError(f"the events in {source.path} cannot be read: {reason}") from None
    return found.sort_by([("layer", "ascending"), ("row", "ascending")])
