"""A store before its first shard: Zarr metadata, tokens, documents, flags and their record."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.files import fsync_directory, seal, write_durably
from mlsae.store.format.calibration import Calibration
from mlsae.store.format.metadata import zarr_metadata
from mlsae.store.format.positions import planned_row_tokens, setup_arrays
from mlsae.store.plan import plan_id_of
from mlsae.store.schema import (
    CHANNEL_MEAN,
    CHANNEL_SCALE,
    COMMITS,
    PROVENANCE,
    ROW_TOKEN,
    SETUP,
    SHARD_MOMENTS,
    chunk_key,
)
from mlsae.store.write.shardfile import ShardFile
from mlsae.store.write.tokens import BLOCK_TOKENS, TokenArrays


def write_setup(
    path: Path, plan: Mapping[str, Any], arrays: TokenArrays, calibration: Calibration | None
) -> None:
    """Write everything but activations; the record of it comes last."""
    plan_id = plan_id_of(plan)
    contents, metadata = zarr_metadata(plan, plan_id), {}
    names = [str(Path(name).parent) for name in contents]
    _make_folders(path, [*names, COMMITS, SHARD_MOMENTS, PROVENANCE])
    for name, data in contents.items():
        write_durably(path / name, data)
        metadata[name] = hashlib.sha256(data).hexdigest()
    objects = {}
    for name, (dtype, length) in setup_arrays(plan).items():
        for shard, start in enumerate(range(0, length, plan["token_shard"])):
            stop = min(start + plan["token_shard"], length)
            blocks = (
                planned_row_tokens(plan, first, min(first + BLOCK_TOKENS, stop)).astype(dtype)
                if name == ROW_TOKEN
                else arrays.block(name, first, min(first + BLOCK_TOKENS, stop))
                for first in range(start, stop, BLOCK_TOKENS)
            )
            key = f"{name}/{chunk_key(shard, 1)}"
            objects[key] = _write(
                path / key,
                blocks,
                np.dtype(dtype).itemsize,
                plan["token_chunk"],
                plan["token_shard"],
            )
    if calibration is not None:
        for site, of_site in calibration.sites.items():
            for name, values in {
                CHANNEL_MEAN: of_site.mean,
                CHANNEL_SCALE: of_site.scale,
            }.items():
                key = f"{name}/{site}/{chunk_key(0, 2)}"
                rows = len(values)
                stored = np.ascontiguousarray(values, "<f4")
                objects[key] = _write(path / key, iter([stored]), 4 * plan["d_model"], rows, rows)
    write_durably(
        path / SETUP, seal({"plan_id": plan_id, "objects": objects, "metadata": metadata})
    )


def _make_folders(path: Path, names: Iterable[str]) -> None:
    """Make folders that outlive a power cut: whatever holds a new one is flushed."""
    folders = sorted(path / name for name in names)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for parent in sorted({folder.parent for folder in folders if folder != path}):
        fsync_directory(parent)


def _write(
    path: Path,
    blocks: Iterator[npt.NDArray[Any]],
    row_bytes: int,
    chunk_rows: int,
    shard_rows: int,
) -> str:
    writer = ShardFile(path, row_bytes=row_bytes, chunk_rows=chunk_rows, shard_rows=shard_rows)
    try:
        for block in blocks:
            writer.write(block)
        return writer.commit()
    finally:
        writer.abandon()
