"""The Zarr metadata of a store, made by zarr-python so that every Zarr v3 reader understands it."""

import json
from collections.abc import Mapping
from typing import Any

import zarr
import zarr.storage
from zarr.codecs import BytesCodec, Crc32cCodec

from mlsae.store.format.compression import Compressor, compressor_of
from mlsae.store.format.encoding import parts_of
from mlsae.store.format.positions import num_rows_of, setup_arrays
from mlsae.store.schema import ACTIVATIONS, ARRAY_METADATA, CHANNEL_MEAN, CHANNEL_SCALE, ROW_TOKEN


def zarr_metadata(plan: Mapping[str, Any], plan_id: str) -> dict[str, bytes]:
    """Path inside the store → bytes of its zarr.json, for every group and array of a plan."""
    memory: dict[str, Any] = {}
    root = zarr.create_group(
        zarr.storage.MemoryStore(memory),
        attributes={"mlsae": {"schema_version": plan["schema_version"], "plan_id": plan_id}},
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
        if plan["calibration"] is not None:
            shape = (len(plan["layers"]), plan["d_model"])
            for name in (CHANNEL_MEAN, CHANNEL_SCALE):
                _create_array(
                    root,
                    f"{name}/{site}",
                    shape=shape,
                    dtype="<f4",
                    chunk=shape[0],
                    shard=shape[0],
                    dimension_names=["layer", "channel"],
                    attributes={"mlsae": {"site": site, "layers": plan["layers"]}},
                )
        for part in parts_of(plan["encoding"], plan["d_model"]):
            _create_array(
                root,
                part.array(site, plan["layers"][0]),
                shape=(num_rows_of(plan), part.width),
                dtype=part.dtype.str,
                chunk=plan["chunk_rows"],
                shard=plan["shard_rows"],
                dimension_names=["row", "channel" if part.folder == ACTIVATIONS else "block"],
                attributes={
                    "mlsae": {
                        "site": site,
                        "layer": plan["layers"][0],
                        "encoding": plan["encoding"],
                    }
                },
                compressor=compressor_of(plan["compression"], part.dtype),
            )
    found = {
        key: json.loads(value.to_bytes())
        for key, value in memory.items()
        if key.rsplit("/", 1)[-1] == ARRAY_METADATA
    }
    # A site's arrays differ in their layer alone, and zarr-python takes a millisecond for each.
    for site in plan["sites"]:
        for part in parts_of(plan["encoding"], plan["d_model"]):
            first = found[f"{part.array(site, plan['layers'][0])}/{ARRAY_METADATA}"]
            about = first["attributes"]["mlsae"]
            for layer in plan["layers"][1:]:
                attributes = {"mlsae": {**about, "layer": layer}}
                name = f"{part.array(site, layer)}/{ARRAY_METADATA}"
                found[name] = {**first, "attributes": attributes}
    return {name: json.dumps(value, indent=2).encode() + b"\n" for name, value in found.items()}


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
    compressor: Compressor | None = None,
) -> None:
    checksum = Crc32cCodec()
    root.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=(shard, *shape[1:]),
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[checksum] if compressor is None else [compressor.codec(), checksum],
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=dimension_names,
        attributes=attributes,
    )
