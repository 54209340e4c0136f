"""A store before its first shard: Zarr metadata, tokens, documents, flags and their record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlsae.base.files import read_sealed, seal, sha256_file, write_durably
from mlsae.store.arrays import ArrayReader, OpenFiles
from mlsae.store.metadata import zarr_metadata
from mlsae.store.plan import TokenArrays, plan_id_of
from mlsae.store.schema import COMMITS, PROVENANCE, SETUP, SHARD_MOMENTS, TOKEN_ARRAYS, chunk_key
from mlsae.store.shardfile import ShardFile


def write_setup(path: Path, plan: Mapping[str, Any], arrays: TokenArrays) -> None:
    """Write everything but activations; the record of it comes last."""
    plan_id = plan_id_of(plan)
    metadata = {}
    for name, data in zarr_metadata(plan, plan_id).items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, data)
        metadata[name] = sha256_file(file)
    objects = {}
    shard_rows = plan["token_shard"]
    for name, values in arrays.items():
        for shard, start in enumerate(range(0, len(values), shard_rows)):
            key = f"{name}/{chunk_key(shard, 1)}"
            writer = ShardFile(
                path / key,
                row_bytes=values.itemsize,
                chunk_rows=plan["token_chunk"],
                shard_rows=shard_rows,
            )
            try:
                writer.write(values[start : start + shard_rows])
                objects[key] = writer.commit()
            finally:
                writer.abandon()
    for directory in (COMMITS, SHARD_MOMENTS, PROVENANCE):
        (path / directory).mkdir(exist_ok=True)
    write_durably(
        path / SETUP, seal({"plan_id": plan_id, "objects": objects, "metadata": metadata})
    )


def read_setup(path: Path) -> dict[str, Any]:
    """The record that `write_setup` left: hashes of token objects and of Zarr metadata."""
    return read_sealed(path / SETUP)


def token_readers(
    path: Path, plan: Mapping[str, Any], files: OpenFiles | None = None
) -> dict[str, ArrayReader]:
    """Readers of tokens, documents and token_flags."""
    return {
        name: ArrayReader(
            path / name,
            num_rows=plan["num_tokens"],
            row_shape=(),
            dtype=np.dtype(dtype),
            chunk_rows=plan["token_chunk"],
            shard_rows=plan["token_shard"],
            files=files,
        )
        for name, dtype in TOKEN_ARRAYS.items()
    }
