"""Every table of an analysis: columns and version. docs/reference/tables.md is made from them."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mlsae.analyze.results.columns import (
    EVENTS,
    EXAMPLES,
    HISTOGRAMS,
    LATENT_LAYERS,
    LATENTS,
    LAYER_COSINE,
    PREFIXES,
    PROMPTS,
    Column,
)
from mlsae.analyze.results.metric_columns import LAYER_METRICS, OVERALL_METRICS
from mlsae.base.errors import InputError

TABLES_VERSION = "1.2"
"""Version of these columns, in every file's schema metadata.

A minor version only adds columns and tables: readers take any minor version of their major one.
"""

_RENAMED = {
    f"{name}{end}": f"{now}{end}"
    for name, now in (
        ("ce_zero", "ce_zero_eligible"),
        ("loss_recovered_zero", "loss_recovered_zero_eligible"),
        ("adjacent_cosine", "adjacent_cosine_pooled"),
    )
    for end in ("", "_low", "_high")
}
"""Columns of `layers` and `overall` before 1.1, and the names of their definitions since. What has
the earlier names since is defined otherwise, and null in earlier tables."""

_SINCE = {"prefixes": "1.2"}
"""First versions with a table, where that is not the first of all."""

_FORMER = "0.4"
"""The version before, with the columns of 1.0 and `events` under the name `activations`."""

TABLES: Mapping[str, tuple[Column, ...]] = {
    "layers": LAYER_METRICS,
    "overall": OVERALL_METRICS,
    "latents": LATENTS,
    "latent_layers": LATENT_LAYERS,
    "prefixes": PREFIXES,
    "histograms": HISTOGRAMS,
    "layer_cosine": LAYER_COSINE,
    "examples": EXAMPLES,
    "events": EVENTS,
    "prompts": PROMPTS,
}
"""Every table of an analysis."""


def schema(table: str, provenance: Mapping[str, str]) -> pa.Schema:
    """Arrow schema of a table: units and definitions by field, `provenance` for the whole."""
    fields = [
        pa.field(c.name, c.type, metadata={"unit": c.unit, "description": c.text})
        for c in TABLES[table]
    ]
    whole = {"mlsae.table": table, "mlsae.tables_version": TABLES_VERSION}
    whole |= {f"mlsae.{key}": value for key, value in provenance.items()}
    return pa.schema(fields, metadata=whole)


def check_version(version: object, directory: Path, remedy: str) -> None:
    """Require that this mlsae reads tables of a version.

    Args:
        version: the version in the directory's record.
        directory: the directory, for the message.
        remedy: the way to make tables of an older version again, for the message.

    Raises:
        InputError: the major version is another one, and the version not 0.4.
    """
    major, ours = (str(of).split(".")[0] for of in (version, TABLES_VERSION))
    if major == ours or version == _FORMER:
        return
    is_newer = major.isdecimal() and int(major) > int(ours)
    raise InputError(
        f"{directory} holds tables of version {version}, this mlsae reads {TABLES_VERSION}: "
        f"{'read them with a newer mlsae' if is_newer else remedy}"
    )


def with_later_columns(table: str, found: pa.Schema) -> pa.Schema:
    """The schema of a table's file, followed by the known columns that the file lacks.

    Columns that are not known here keep their places.
    """
    known = schema(table, {})
    return pa.schema([*found, *(f for f in known if f.name not in found.names)], found.metadata)


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _is_before_renaming(found: pa.Schema) -> bool:
    version = (found.metadata or {}).get(b"mlsae.tables_version", TABLES_VERSION.encode())
    return version in (b"1.0", _FORMER.encode())


def read_table(path: Path, table: str, version: str = TABLES_VERSION) -> pa.Table:
    """A table in memory, with nulls in the columns that an earlier version lacks.

    A table that the version lacks is empty.

    Raises:
        OSError: the file cannot be read.
        pyarrow.ArrowException: the file is damaged.
    """
    if _number(version) < _number(_SINCE.get(table, "0.0")):
        return schema(table, {}).empty_table()
    found = pq.read_table(path)
    if _is_before_renaming(found.schema) and table in ("layers", "overall"):
        fields = [f.with_name(_RENAMED.get(f.name, f.name)) for f in found.schema]
        renamed = pa.schema(fields, found.schema.metadata)
        found = pa.Table.from_arrays(found.columns, schema=renamed)
    for field in with_later_columns(table, found.schema):
        if field.name not in found.column_names:
            found = found.append_column(field, pa.nulls(len(found), field.type))
    return found
