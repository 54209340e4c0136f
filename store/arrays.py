"""Reading an array by rows: positioned reads into the caller's buffer, each chunk checked once.

A memory map would be simpler, but its pages count as resident memory and single rows through a cold
one are an order of magnitude slower than sequential reading.
"""

import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.store.errors import DamagedStoreError
from mlsae.store.layout import CRC_BYTES, object_bytes
from mlsae.store.schema import chunk_key
from mlsae.store.shardfile import crc32c_bytes, index_bytes, shard_index

Array = npt.NDArray[Any]


class _Descriptor:
    """A file descriptor that closes when its last user lets go of it."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class OpenFiles:
    """The least recently used descriptors of a store, well under the process's limit."""

    def __init__(self) -> None:
        self._limit = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> tuple[_Descriptor, bool]:
        """The descriptor of a file, and whether it was opened only now."""
        with self._lock:
            if (found := self._open.get(path)) is not None:
                self._open.move_to_end(path)
                return found, False
            opened = self._open[path] = _Descriptor(path)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
            return opened, True


class ArrayReader:
    """Rows of one array of a store. Threads may share it.

    The first time this process touches a chunk, it reads the whole chunk and checks its CRC-32C;
    a shard's index is checked when the shard is opened.
    """

    def __init__(
        self,
        directory: Path,
        *,
        num_rows: int,
        row_shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        chunk_rows: int,
        shard_rows: int,
        files: OpenFiles | None = None,
    ) -> None:
        self.num_rows = num_rows
        self.row_shape = row_shape
        self.dtype = np.dtype(dtype)
        self._row_bytes = int(np.prod(row_shape, dtype=np.int64)) * self.dtype.itemsize
        self._chunk_rows = chunk_rows
        self._shard_rows = shard_rows
        self._chunk_bytes = chunk_rows * self._row_bytes
        self._chunks_per_shard = shard_rows // chunk_rows
        self._name = directory.name if not row_shape else "/".join(directory.parts[-3:])
        num_shards = -(-num_rows // shard_rows)
        keys = [chunk_key(shard, 1 + len(row_shape)) for shard in range(num_shards)]
        self._paths = [str(directory / key) for key in keys]
        self._checked = np.zeros(num_shards * self._chunks_per_shard, np.bool_)
        self._files = files or OpenFiles()
        self._local = threading.local()

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        """Rows start … stop − 1, of the stored data type.

        Raises:
            InputError: the range is not within the array.
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        stop = self.num_rows if stop is None else stop
        if not 0 <= start <= stop <= self.num_rows:
            raise InputError(
                f"{self._name}: rows {start} to {stop} are not in 0 to {self.num_rows}"
            )
        out = np.empty((stop - start, *self.row_shape), self.dtype)
        self.read_into(out, start)
        return out

    def read_into(self, out: Array, start: int) -> None:
        """Fill `out` with the rows from `start` on.

        Args:
            out: (n, *row_shape) of the stored data type, C-contiguous.
            start: first row; start + n may not pass the end.

        Raises:
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        done, num_rows = 0, len(out)
        while done < num_rows:
            chunk, first = divmod(start + done, self._chunk_rows)
            take = min(num_rows - done, self._chunk_rows - first)
            piece = out if take == num_rows else out[done : done + take]
            self._read_in_chunk(piece, chunk, first)
            done += take

    def check_chunk(self, chunk: int) -> Array:
        """Read one whole chunk, padding included, and check it; (chunk_rows, *row_shape)."""
        buffer = self._load_chunk(chunk)
        return buffer[: self._chunk_bytes].view(self.dtype).reshape(-1, *self.row_shape)

    def _read_in_chunk(self, out: Array, chunk: int, first: int) -> None:
        if not self._checked[chunk]:
            buffer = self._load_chunk(chunk)
            start = first * self._row_bytes
            out.reshape(-1).view(np.uint8)[:] = buffer[start : start + out.nbytes]
            self._checked[chunk] = True
            return
        shard, inner = divmod(chunk, self._chunks_per_shard)
        file = self._open(shard)
        offset = inner * (self._chunk_bytes + CRC_BYTES) + first * self._row_bytes
        if os.preadv(file.number, [out.data], offset) != out.nbytes:
            raise self._damage(shard, "it ends too early")

    def _load_chunk(self, chunk: int) -> npt.NDArray[np.uint8]:
        shard, inner = divmod(chunk, self._chunks_per_shard)
        file = self._open(shard)
        size = self._chunk_bytes + CRC_BYTES
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.empty(size, np.uint8)
        buffer: npt.NDArray[np.uint8] = self._local.buffer
        if os.preadv(file.number, [buffer.data], inner * size) != size:
            raise self._damage(shard, "it ends too early")
        if crc32c_bytes(buffer[: self._chunk_bytes]) != buffer[self._chunk_bytes :].tobytes():
            raise self._damage(shard, f"the checksum of its chunk {inner} does not match")
        return buffer

    def _open(self, shard: int) -> _Descriptor:
        try:
            file, is_new = self._files.get(self._paths[shard])
        except FileNotFoundError:
            raise self._damage(shard, "its file is missing") from None
        if is_new:
            self._check_index(shard, file)
        return file

    def _check_index(self, shard: int, file: _Descriptor) -> None:
        rows = min(self._shard_rows, self.num_rows - shard * self._shard_rows)
        size = object_bytes(rows, self._row_bytes, self._chunk_rows, self._shard_rows)
        found = os.fstat(file.number).st_size
        if found != size:
            raise self._damage(shard, f"it has {found} bytes, not {size}")
        num_used = -(-rows // self._chunk_rows)
        expected = shard_index(num_used, self._chunks_per_shard, self._chunk_bytes)
        length = index_bytes(self._chunks_per_shard)
        if os.pread(file.number, length, size - length) != expected:
            raise self._damage(shard, "its index does not match")

    def _damage(self, shard: int, what: str) -> DamagedStoreError:
        return DamagedStoreError(
            f"{self._paths[shard]} (shard {shard} of {self._name}) is damaged: {what}; "
            f"restore it from a copy, or run `mlsae store verify` to see all damage"
        )
