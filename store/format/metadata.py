"""A store's Zarr metadata, made by zarr-python so that every Zarr v3 reader understands it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
import zarr.storage
from zarr.codecs import BytesCodec, Crc32cCodec

from mlsae.store.format.compression import Compression, Compressor, compressor_of
from mlsae.store.schema import ARRAY_METADATA, chunk_key


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One Zarr array in a store: its name, its sizes, and how it is cut."""

    name: str
    """The array's path inside the store."""
    num_rows: int
    """Length of the first axis."""
    row_shape: tuple[int, ...]
    """Row shape: the other axes."""
    dtype: np.dtype[Any]
    """Stored data type."""
    chunk_rows: int
    """Rows in a chunk."""
    shard_rows: int
    """Rows in a shard, whole chunks."""
    dimensions: tuple[str, ...]
    """Each axis's name."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """The array's attributes under the key `mlsae`; no key where there are none."""
    compression: Compression | None = None
    """Compression for the chunks; None where they lie as they are."""

    @property
    def num_shards(self) -> int:
        """Objects in the array."""
        return -(-self.num_rows // self.shard_rows)

    @property
    def row_bytes(self) -> int:
        """Bytes per row before compression."""
        return int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def compressor(self) -> Compressor | None:
        """Compressor for the chunks; None where they lie as they are."""
        return compressor_of(self.compression, self.dtype)

    def object(self, shard: int) -> str:
        """Name of the object that holds a shard."""
        return f"{self.name}/{chunk_key(shard, 1 + len(self.row_shape))}"


def zarr_metadata(arrays: Iterable[ArraySpec], about: Mapping[str, Any]) -> dict[str, bytes]:
    """Path inside the store → bytes of its zarr.json, for every group and array.

    Args:
        arrays: the store's arrays; those in one folder differ in name and attributes alone.
        about: attributes for the whole store, under the key `mlsae`.
    """
    memory: dict[str, Any] = {}
    root = zarr.create_group(zarr.storage.MemoryStore(memory), attributes={"mlsae": dict(about)})
    first_of: dict[str, ArraySpec] = {}
    others = []
    for spec in arrays:
        folder = spec.name.rpartition("/")[0] or spec.name
        if folder in first_of:
            others.append((spec, first_of[folder]))
        else:
            first_of[folder] = spec
            _create_array(root, spec)
    found = {
        key: json.loads(value.to_bytes())
        for key, value in memory.items()
        if key.rsplit("/", 1)[-1] == ARRAY_METADATA
    }
    # zarr-python takes a millisecond for each array, and a store may have a thousand alike.
    for spec, first in others:
        made = found[f"{first.name}/{ARRAY_METADATA}"]
        found[f"{spec.name}/{ARRAY_METADATA}"] = {**made, "attributes": _attributes(spec)}
    return {name: json.dumps(value, indent=2).encode() + b"\n" for name, value in found.items()}


def is_consolidated(found: bytes, expected: bytes) -> bool:
    """True where the metadata of a group are the expected ones but for `consolidated_metadata`.

    `zarr.consolidate_metadata` adds them: a copy of the arrays' metadata, for readers elsewhere.
    """
    try:
        content = json.loads(found)
        added = content.pop("consolidated_metadata", None)
    except (ValueError, AttributeError, RecursionError):
        return False
    return added is not None and content == json.loads(expected)


def _attributes(spec: ArraySpec) -> dict[str, Any]:
    return {"mlsae": dict(spec.attributes)} if spec.attributes else {}


def _create_array(root: zarr.Group, spec: ArraySpec) -> None:
    checksum, compressor = Crc32cCodec(), spec.compressor
    root.create_array(
        spec.name,
        shape=(spec.num_rows, *spec.row_shape),
        dtype=spec.dtype.str,
        chunks=(spec.chunk_rows, *spec.row_shape),
        shards=(spec.shard_rows, *spec.row_shape),
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[checksum] if compressor is None else [compressor.codec(), checksum],
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=list(spec.dimensions),
        attributes=_attributes(spec),
    )
