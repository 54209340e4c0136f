"""The Zarr metadata of a store, made by zarr-python so that every Zarr v3 reader understands it."""

import json
from collections.abc import Mapping
from typing import Any

import zarr
import zarr.storage
from zarr.codecs import BytesCodec, Crc32cCodec

from mlsae.store.encoding import STORED_DTYPE
from mlsae.store.rows import num_rows_of, setup_arrays
from mlsae.store.schema import ARRAY_METADATA, ROW_TOKEN, SCHEMA_VERSION, activation_array


def zarr_metadata(plan: Mapping[str, Any], plan_id: str) -> dict[str, bytes]:
    """Path inside the store → bytes of its zarr.json, for every group and array of a plan."""
    memory: dict[str, Any] = {}
    root = zarr.create_group(
        zarr.storage.MemoryStore(memory),
        attributes={"mlsae": {"schema_version": SCHEMA_VERSION, "plan_id": plan_id}},
    )
    for name, (dtype, length) in setup_arrays(plan).items():
        _create_array(
            root,
            name,
            shape=(length,),
            dtype=dtype,
            chunk=plan["token_chunk"],
            shard=plan["token_shard"],
            dimension_names=["row" if name == ROW_TOKEN else "token"],
            attributes={},
        )
    for site in plan["sites"]:
        for layer in plan["layers"]:
            _create_array(
                root,
                activation_array(site, layer),
                shape=(num_rows_of(plan), plan["d_model"]),
                dtype=STORED_DTYPE[plan["encoding"]].str,
                chunk=plan["chunk_rows"],
                shard=plan["shard_rows"],
                dimension_names=["row", "channel"],
                attributes={"mlsae": {"site": site, "layer": layer, "encoding": plan["encoding"]}},
            )
    return {
        key: json.dumps(json.loads(value.to_bytes()), indent=2).encode() + b"\n"
        for key, value in memory.items()
        if key.rsplit("/", 1)[-1] == ARRAY_METADATA
    }


def _create_array(
    root: zarr.Group,
    name: str,
    *,
    shape: tuple[int, ...],
    dtype: str,
    chunk: int,
    shard: int,
    dimension_names: list[str],
    attributes: dict[str, Any],
) -> None:
    root.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=(shard, *shape[1:]),
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=dimension_names,
        attributes=attributes,
    )
