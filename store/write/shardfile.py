"""The bytes of one Zarr v3 shard: chunks in C order, each with its CRC-32C, then index and its CRC.

The layout is that of Zarr's `sharding_indexed` codec with inner codecs `bytes` (little endian),
`blosc` where chunks are compressed, and `crc32c`, index at the end with codecs `bytes` and `crc32c`
(Zarr v3 core and codec specifications). Written here, and not by a Zarr library, because none of
them is durable, hashes while it writes, and gives the same bytes on every run.
"""

import errno
import hashlib
import os
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from mlsae.base.files import fsync_directory, full_disk_explained, open_partial
from mlsae.store.format.metadata import ArraySpec
from mlsae.store.format.shard import Bytes, shard_index
from mlsae.store.schema import CRC_BYTES

_RWF_DONTCACHE = 0x80
"""Flag from uapi/linux/fs.h, Linux 6.14: pages leave the page cache once they are on disk."""
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EINVAL})


class ShardFile:
    """One shard being written, piece by piece, under a temporary name until `commit`.

    Args:
        path: the file.
        spec: the array that the shard belongs to.
        cached: leave written bytes in the page cache. Finding room for it there takes more of the
            CPU's time than the copy, where memory is full. Elsewhere than on Linux, and where the
            file system does not know how, it stays there all the same.
    """

    def __init__(self, path: Path, spec: ArraySpec, *, cached: bool = True) -> None:
        self._path = path
        self._chunk_bytes = spec.row_bytes * spec.chunk_rows
        self._num_chunks = spec.shard_rows // spec.chunk_rows
        self._compressor = spec.compressor
        # Only whole chunks can be compressed; others go to the file as they come.
        self._whole = None if self._compressor is None else np.empty(self._chunk_bytes, np.uint8)
        self._hash = hashlib.sha256()
        self._crc = 0
        self._in_chunk = 0
        self._sizes: list[int] = []
        self.num_bytes = 0
        self._flags = 0 if cached or sys.platform != "linux" else _RWF_DONTCACHE
        self._partial, self._fd = open_partial(path)

    def write(self, rows: npt.NDArray[np.generic]) -> None:
        """Add rows of the stored data type, C-contiguous."""
        data = rows.reshape(-1).view(np.uint8)
        start = 0
        while start < len(data):
            take = min(len(data) - start, self._chunk_bytes - self._in_chunk)
            self._add(data[start : start + take])
            start += take

    def commit(self) -> str:
        """Pad the last chunk with zeros, write the index, make the shard durable under its name.

        Returns:
            Hex SHA-256 of the file.
        """
        if self._in_chunk:
            self._add(np.zeros(self._chunk_bytes - self._in_chunk, np.uint8))
        self._put(np.frombuffer(shard_index(self._sizes, self._num_chunks), np.uint8))
        with full_disk_explained(self._path):
            os.fsync(self._fd)
        self._partial.rename(self._path)
        os.close(self._fd)
        self._fd = -1
        fsync_directory(self._path.parent)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Remove the file; does nothing after `commit`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._partial.unlink(missing_ok=True)

    def _add(self, piece: Bytes) -> None:
        """Add bytes that do not pass the end of the chunk in hand."""
        self._in_chunk += len(piece)
        is_whole, size = self._in_chunk == self._chunk_bytes, self._chunk_bytes
        if self._whole is not None:
            self._whole[self._in_chunk - len(piece) : self._in_chunk] = piece
            if not is_whole:
                return
            assert self._compressor is not None
            piece = self._compressor.compress(self._whole)
            size = len(piece)
        self._crc = google_crc32c.extend(self._crc, piece)
        if not is_whole:
            self._put(piece)
            return
        self._put(piece, np.frombuffer(int(self._crc).to_bytes(CRC_BYTES, "little"), np.uint8))
        self._sizes.append(size + CRC_BYTES)
        self._crc = 0
        self._in_chunk = 0

    def _put(self, *pieces: Bytes) -> None:
        for piece in pieces:
            self._hash.update(piece.data)
        views = [piece.data for piece in pieces]
        with full_disk_explained(self._path):
            while views:
                count = self._write(views)
                self.num_bytes += count
                while views and count >= len(views[0]):
                    count -= len(views.pop(0))
                if views:
                    views[0] = views[0][count:]

    def _write(self, views: list[memoryview]) -> int:
        """Bytes of the views that were written."""
        if self._flags:
            try:
                return os.pwritev(self._fd, views, self.num_bytes, self._flags)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
            self._flags = 0
        return os.pwritev(self._fd, views, self.num_bytes)
