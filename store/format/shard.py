"""The index of a Zarr v3 shard, and chunk checksums.

The layout is that of Zarr's `sharding_indexed` codec, index at the end with codecs `bytes` and
`crc32c` (Zarr v3 core and codec specifications).
"""

import google_crc32c
import numpy as np
import numpy.typing as npt

from mlsae.store.format.layout import INDEX_ENTRY_BYTES
from mlsae.store.schema import CRC_BYTES

Bytes = npt.NDArray[np.uint8]
ABSENT = 2**64 - 1
"""Offset and size, in the index, of a chunk that is not there."""


def crc32c_bytes(data: Bytes) -> bytes:
    """CRC-32C of the bytes, little endian."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def shard_index(sizes: list[int], num_chunks: int) -> bytes:
    """The index of a shard whose first chunks follow one another, and its CRC.

    Args:
        sizes: bytes of each chunk that is there, its checksum included.
        num_chunks: chunks that a full shard has.
    """
    index = np.full((num_chunks, 2), ABSENT, "<u8")
    index[: len(sizes), 1] = sizes
    index[: len(sizes), 0] = np.cumsum([0, *sizes])[:-1]
    raw = index.reshape(-1).view(np.uint8)
    return raw.tobytes() + crc32c_bytes(raw)


def index_bytes(num_chunks: int) -> int:
    """Bytes of a shard's index and its CRC."""
    return num_chunks * INDEX_ENTRY_BYTES + CRC_BYTES
