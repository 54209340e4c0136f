"""A store before its first shard: Zarr metadata, tokens, documents, flags and their record."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.files import fsync_directory, seal, write_durably
from mlsae.store.format.calibration import Calibration
from mlsae.store.format.metadata import ArraySpec
from mlsae.store.plan import Plan
from mlsae.store.read.records import SetupRecord
from mlsae.store.schema import (
    CHANNEL_MEAN,
    CHANNEL_SCALE,
    COMMITS,
    PROVENANCE,
    ROW_TOKEN,
    SETUP,
    SHARD_MOMENTS,
)
from mlsae.store.write.shardfile import ShardFile
from mlsae.store.write.tokens import BLOCK_TOKENS, TokenArrays


def write_setup(
    path: Path, plan: Plan, arrays: TokenArrays, calibration: Calibration | None
) -> None:
    """Write everything but activations; the record of it comes last."""
    contents, metadata = plan.metadata(), {}
    names = [str(Path(name).parent) for name in contents]
    _make_folders(path, [*names, COMMITS, SHARD_MOMENTS, PROVENANCE])
    for name, data in contents.items():
        write_durably(path / name, data)
        metadata[name] = hashlib.sha256(data).hexdigest()
    objects = {}
    for spec in plan.token_arrays:
        for shard in range(spec.num_shards):
            start = shard * spec.shard_rows
            stop = min(start + spec.shard_rows, spec.num_rows)
            blocks = (
                plan.row_tokens(first, min(first + BLOCK_TOKENS, stop)).astype(spec.dtype)
                if spec.name == ROW_TOKEN
                else arrays.block(spec.name, first, min(first + BLOCK_TOKENS, stop))
                for first in range(start, stop, BLOCK_TOKENS)
            )
            objects[spec.object(shard)] = _write(path, spec, shard, blocks)
    if calibration is not None:
        values = {}
        for site, of_site in calibration.sites.items():
            values[f"{CHANNEL_MEAN}/{site}"] = of_site.mean
            values[f"{CHANNEL_SCALE}/{site}"] = of_site.scale
        for spec in plan.calibration_arrays:
            stored = np.ascontiguousarray(values[spec.name], spec.dtype)
            objects[spec.object(0)] = _write(path, spec, 0, iter([stored]))
    record = SetupRecord(plan_id=plan.id, objects=objects, metadata=metadata)
    write_durably(path / SETUP, seal(record.to_json()))


def _make_folders(path: Path, names: Iterable[str]) -> None:
    """Make folders that outlive a power cut: the parent of a new one is flushed."""
    folders = sorted(path / name for name in names)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for parent in sorted({folder.parent for folder in folders if folder != path}):
        fsync_directory(parent)


def _write(path: Path, spec: ArraySpec, shard: int, blocks: Iterator[npt.NDArray[Any]]) -> str:
    """Write a shard; hex SHA-256 of its bytes."""
    writer = ShardFile(path / spec.object(shard), spec)
    try:
        for block in blocks:
            writer.write(block)
        return writer.commit()
    finally:
        writer.abandon()
