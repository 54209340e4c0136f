"""`mlsae latents`: the latents of an analysis that a condition chooses."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlsae.analyze.results.analysis import load
from mlsae.analyze.results.text.filter import check_columns, check_named_latents, where
from mlsae.base.directories import require_outside_stores
from mlsae.base.errors import InputError
from mlsae.base.files import write_durably
from mlsae.base.units import counted, format_count

SHOWN = (
    "latent",
    "count",
    "density",
    "mean",
    "layer_mean",
    "layer_std",
    "num_layers",
    "token_entropy",
    "decoder_cosine",
)
"""Columns that are printed by default."""

PRINTED = 20
"""Latents that are printed by default."""


def choose(
    latents: pa.Table,
    *,
    condition: str | None = None,
    sort: str | None = None,
    limit: int | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Rows and columns of the table `latents`.

    Args:
        latents: the table.
        condition: a condition of `mlsae.analyze.results.text.filter.where`; None for all latents.
        sort: the column to sort by, smallest first, or largest first after a -. Nulls come last,
            equal values in the order of latents. None keeps the order.
        limit: largest number of rows; None for all.
        columns: names of columns, in order; None for all.

    Raises:
        InputError: a column is missing or has no order, the condition cannot be read, or it
            chooses nothing and names a latent that is missing.
    """
    found = latents if condition is None else where(latents, condition)
    if condition is not None and len(found) == 0:
        check_named_latents(latents, condition)
    if sort is not None:
        name = sort.removeprefix("-")
        check_columns("--sort", latents, [name])
        if pa.types.is_nested(latents.schema.field(name).type):
            raise InputError(f"--sort: the column {name!r} holds lists, which have no order")
        keys = {name: "ascending" if name == sort else "descending"} | (
            {} if name == "latent" else {"latent": "ascending"}
        )
        found = found.take(pc.sort_indices(found, sort_keys=list(keys.items())))
    if limit is not None:
        found = found.slice(0, limit)
    if columns is not None:
        check_columns("--columns", latents, list(columns))
        found = found.select(list(columns))
    return found


def list_latents(
    analysis: Path,
    *,
    condition: str | None,
    sort: str | None,
    limit: int | None,
    columns: Sequence[str] | None,
    out: Path | None,
) -> str:
    """Choose latents of an analysis, and write them to a Parquet file or return them as text.

    Raises:
        InputError: `analysis` holds no analysis, `out` exists, or as for `choose`.
    """
    latents = load(analysis).latents
    if out is not None:
        _check_out(out)
    chosen = choose(latents, condition=condition, sort=sort, columns=columns or None)
    whole = f"{format_count(len(chosen))} of {counted(len(latents), 'latent')}"
    if out is not None:
        kept = chosen.slice(0, limit)
        buffer = pa.BufferOutputStream()
        pq.write_table(kept, buffer, compression="zstd")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(out, buffer.getvalue().to_pybytes())
        return f"{whole}, {format_count(len(kept))} of them written to {out}"
    kept = chosen.slice(0, PRINTED if limit is None else limit)
    shown = kept.select(list(columns or SHOWN))
    more = "" if len(kept) == len(chosen) else f", {format_count(len(kept))} of them shown"
    return f"{_text(shown)}\n\n{whole}{more}"


def _check_out(out: Path) -> None:
    require_outside_stores(out, "--out")
    if out.exists():
        raise InputError(f"--out {out} exists already: give another name")
    if out.suffix.lower() not in ("", ".parquet", ".pq"):
        raise InputError(f"--out {out} would be a Parquet file: give a name that ends in .parquet")


def _text(table: pa.Table) -> str:
    rows = [table.column_names]
    rows += [[_cell(value) for value in row.values()] for row in table.to_pylist()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
