"""Opening the events of an analysis or of `mlsae activations`, and reading those of one latent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pd
import pyarrow.parquet as pq

from mlsae.analyze.results.directory import ACTIVATIONS
from mlsae.analyze.results.events_directory import ActivationsDirectory
from mlsae.analyze.results.parts import PartRecord, check_part
from mlsae.analyze.results.tables import TABLES_VERSION
from mlsae.base.errors import InputError

_PARTITIONING = pd.partitioning(pa.schema([("layer", pa.int32())]), flavor="hive")


class HasEvents(Protocol):
    """An `Analysis` or `Activations`."""

    @property
    def path(self) -> Path:
        """The directory."""

    @property
    def summary(self) -> Mapping[str, Any]:
        """With `layers`, `num_latents` and, under `activations`, the parts."""

    @property
    def activations(self) -> pd.Dataset:
        """The events."""


@dataclass(frozen=True, eq=False)
class Activations:
    """What `mlsae activations` wrote."""

    path: Path
    """Its directory."""

    summary: Mapping[str, Any]
    """What it is of and, under `activations`, its numbers of events and bytes, and its parts."""

    activations: pd.Dataset
    """One row an active latent of a row and layer; not in memory until it is scanned."""


def load_activations(directory: str | Path) -> Activations:
    """Open a directory that `mlsae activations` has finished.

    Raises:
        InputError: it is none, unfinished, of another version, or a part is missing or damaged.
    """
    of = ActivationsDirectory(Path(directory))
    summary = of.plan()
    if summary["tables_version"] != TABLES_VERSION:
        raise InputError(
            f"{directory} holds tables of version {summary['tables_version']}, this mlsae reads "
            f"{TABLES_VERSION}: make them again with mlsae activations"
        )
    summary["activations"] = of.totals()
    return Activations(
        path=of.path, summary=summary, activations=open_events(of.path, summary["activations"])
    )


def open_events(directory: Path, totals: Mapping[str, Any]) -> pd.Dataset:
    """The events in `directory` as a data set, its files by layer, then row.

    Args:
        directory: that holds the folder `activations`.
        totals: with the parts under `parts`.

    Raises:
        InputError: a part is missing, or has not the size that it was written with.
    """
    folder = directory / ACTIVATIONS
    records = records_of(totals)
    for record in records:
        check_part(folder, record, every_byte=False)
    by_place = sorted(records, key=lambda record: (len(record.path), record.path))
    files = [str(folder / record.path) for record in by_place]
    options = pd.ParquetFragmentScanOptions(page_checksum_verification=True)
    return pd.dataset(
        files,
        schema=pq.read_schema(files[0]),
        format=pd.ParquetFileFormat(default_fragment_scan_options=options),
        partitioning=_PARTITIONING,
        partition_base_dir=str(folder),
    )


def records_of(totals: Mapping[str, Any]) -> list[PartRecord]:
    """The parts that `totals_of` listed."""
    return [PartRecord(**record) for record in totals["parts"]]


def latent_events(
    source: HasEvents, latent: int, *, layers: Sequence[int] | None = None
) -> pa.Table:
    """The events of one latent, by layer, then row.

    Of each part of those layers its footer and the row groups that hold the latent are read, which
    is at least one; every page is checked.

    Args:
        source: what `load` or `load_activations` gave.
        latent: its index.
        layers: layer ids; all if not given.

    Raises:
        InputError: no such latent or layer, or a part is damaged.
    """
    known, num_latents = source.summary["layers"], source.summary["num_latents"]
    if not 0 <= latent < num_latents:
        raise InputError(
            f"there is no latent {latent}: {source.path} is of an SAE with latents 0 to "
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
        found = source.activations.to_table(filter=wanted)
    except (OSError, pa.ArrowException) as error:
        for record in records_of(source.summary["activations"]):
            check_part(source.path / ACTIVATIONS, record, every_byte=True)
        reason = str(error).splitlines()[0]
        raise InputError(f"the events in {source.path} cannot be read: {reason}") from None
    return found.sort_by([("layer", "ascending"), ("row", "ascending")])
