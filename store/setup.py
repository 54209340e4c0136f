"""A store before its first shard: Zarr metadata, tokens, documents, flags and their record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlsae.base.files import read_sealed, seal, sha256_file, write_durably
from mlsae.store.arrays import ArrayReader, OpenFiles
from mlsae.store.metadata import zarr_metadata
from mlsae.store.plan import plan_id_of
from mlsae.store.rows import planned_row_tokens, setup_arrays
from mlsae.store.schema import COMMITS, PROVENANCE, ROW_TOKEN, SETUP, SHARD_MOMENTS, chunk_key
from mlsae.store.shardfile import ShardFile
from mlsae.store.tokens import BLOCK_TOKENS, TokenArrays


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
    for name, (dtype, length) in setup_arrays(plan).items():
        for shard, start in enumerate(range(0, length, shard_rows)):
            key = f"{name}/{chunk_key(shard, 1)}"
            writer = ShardFile(
                path / key,
                row_bytes=np.dtype(dtype).itemsize,
                chunk_rows=plan["token_chunk"],
                shard_rows=shard_rows,
            )
            stop = min(start + shard_rows, length)
            try:
                for first in range(start, stop, BLOCK_TOKENS):
                    end = min(first + BLOCK_TOKENS, stop)
                    if name == ROW_TOKEN:
                        writer.write(planned_row_tokens(plan, first, end).astype(dtype))
                    else:
                        writer.write(arrays.block(name, first, end))
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


def setup_readers(
    path: Path, plan: Mapping[str, Any], files: OpenFiles | None = None
) -> dict[str, ArrayReader]:
    """Readers of tokens, documents and token_flags, and of row_token where there is one."""
    return {
        name: ArrayReader(
            path / name,
            num_rows=length,
            row_shape=(),
            dtype=np.dtype(dtype),
            chunk_rows=plan["token_chunk"],
            shard_rows=plan["token_shard"],
            files=files,
        )
        for name, (dtype, length) in setup_arrays(plan).items()
    }
