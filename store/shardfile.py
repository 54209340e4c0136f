"""The bytes of one Zarr v3 shard: chunks in C order, each with its CRC-32C, then index and its CRC.

The layout is that of Zarr's `sharding_indexed` codec with inner codecs `bytes` (little endian) and
`crc32c`, index at the end with codecs `bytes` and `crc32c` (Zarr v3 core and codec specifications).
Written here, and not by a Zarr library, because none of them is durable, hashes while it writes,
and gives the same bytes on every run.
"""

import hashlib
import os
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from mlsae.base.files import fsync_directory, full_disk_explained, partial_path
from mlsae.store.layout import CRC_BYTES, INDEX_ENTRY_BYTES

Bytes = npt.NDArray[np.uint8]
ABSENT = 2**64 - 1


def crc32c_bytes(data: Bytes) -> bytes:
    """CRC-32C of the bytes, little endian."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def shard_index(num_used: int, num_chunks: int, chunk_bytes: int) -> bytes:
    """The index of a shard whose first `num_used` chunks follow one another, and its CRC."""
    index = np.full((num_chunks, 2), ABSENT, "<u8")
    size = chunk_bytes + CRC_BYTES
    index[:num_used, 0] = np.arange(num_used, dtype=np.uint64) * np.uint64(size)
    index[:num_used, 1] = size
    raw = index.reshape(-1).view(np.uint8)
    return raw.tobytes() + crc32c_bytes(raw)


def index_bytes(num_chunks: int) -> int:
    """Bytes of a shard's index and its CRC."""
    return num_chunks * INDEX_ENTRY_BYTES + CRC_BYTES


class ShardFile:
    """One shard being written, piece by piece, under a temporary name until `commit`."""

    def __init__(self, path: Path, *, row_bytes: int, chunk_rows: int, shard_rows: int) -> None:
        self._path = path
        self._chunk_bytes = row_bytes * chunk_rows
        self._num_chunks = shard_rows // chunk_rows
        self._hash = hashlib.sha256()
        self._crc = 0
        self._in_chunk = 0
        self._used = 0
        self.num_bytes = 0
        self._partial = partial_path(path)
        self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def write(self, rows: npt.NDArray[np.generic]) -> None:
        """Add rows of the stored data type, C-contiguous."""
        data = rows.reshape(-1).view(np.uint8)
        start = 0
        while start < len(data):
            take = min(len(data) - start, self._chunk_bytes - self._in_chunk)
            piece = data[start : start + take]
            self._crc = google_crc32c.extend(self._crc, piece)
            self._put(piece)
            self._in_chunk += take
            start += take
            if self._in_chunk == self._chunk_bytes:
                self._end_chunk()

    def commit(self) -> str:
        """Pad the last chunk with zeros, write the index, make the shard durable under its name.

        Returns:
            Hex SHA-256 of the file.
        """
        if self._in_chunk:
            padding = np.zeros(self._chunk_bytes - self._in_chunk, np.uint8)
            self._crc = google_crc32c.extend(self._crc, padding)
            self._put(padding)
            self._end_chunk()
        index = shard_index(self._used, self._num_chunks, self._chunk_bytes)
        self._put(np.frombuffer(index, np.uint8))
        with full_disk_explained(self._path):
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._partial.rename(self._path)
        fsync_directory(self._path.parent)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Remove what was written; does nothing after `commit`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._partial.unlink(missing_ok=True)

    def _end_chunk(self) -> None:
        self._put(np.frombuffer(int(self._crc).to_bytes(CRC_BYTES, "little"), np.uint8))
        self._crc = 0
        self._in_chunk = 0
        self._used += 1

    def _put(self, data: Bytes) -> None:
        self._hash.update(data.data)
        view = data.data
        with full_disk_explained(self._path):
            while view:
                view = view[os.write(self._fd, view) :]
        self.num_bytes += len(data)
