"""Reading an array by rows: parts of objects into the caller's buffer, each chunk checked once.

A memory map would be simpler, but its pages count as resident memory and single rows through a cold
one are an order of magnitude slower than sequential reading.
"""

import hashlib
import operator
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.files import in_its_place
from mlsae.base.units import whole
from mlsae.store.errors import DamagedStoreError, StoreError
from mlsae.store.format.layout import MAX_OBJECT_BYTES, chunk_offset, object_bytes
from mlsae.store.format.metadata import ArraySpec
from mlsae.store.format.shard import ABSENT, Bytes, crc32c_bytes, index_bytes
from mlsae.store.places.objects import Descriptor, LocalObjects, Objects
from mlsae.store.schema import CRC_BYTES

Array = npt.NDArray[Any]

_INDEXES_BYTES = 2**22
"""Most bytes that a reader keeps of compressed shards' indexes, its last one aside."""


@dataclass(frozen=True)
class _Shard:
    """A shard whose index was checked."""

    number: int
    name: str
    checked: npt.NDArray[np.bool_]
    """For each chunk, whether this process has seen its checksum match."""
    spans: npt.NDArray[np.uint64] | None
    """(chunks, 2) offset and bytes of each; None where chunks are not compressed."""


class ArrayReader:
    """Rows of one array of a store. Threads may share it.

    The first time this process touches a chunk, it reads the whole chunk and checks its CRC-32C;
    a shard's index is checked when the shard is first touched. Chunks that are compressed or come
    from elsewhere are read whole, and checked, each time.

    Args:
        objects: the store's.
        spec: the array's name and sizes.
    """

    def __init__(self, objects: Objects, spec: ArraySpec) -> None:
        self.num_rows = spec.num_rows
        self.row_shape = spec.row_shape
        self.dtype = spec.dtype
        self._objects = objects
        self._spec = spec
        self._name = spec.name
        self._row_bytes = spec.row_bytes
        self.chunk_rows = spec.chunk_rows
        self._shard_rows = spec.shard_rows
        self._chunk_bytes = spec.chunk_rows * spec.row_bytes
        self.chunks_per_shard = spec.shard_rows // spec.chunk_rows
        self._compressor = spec.compressor
        self._reads_parts = spec.compression is None and objects.is_local
        self._files = objects if self._reads_parts and isinstance(objects, LocalObjects) else None
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._local = threading.local()

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        """Rows start … stop − 1, of the stored data type.

        Raises:
            InputError: the range is not within the array.
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        start = whole("the first row", start)
        stop = self.num_rows if stop is None else whole("the end of rows", stop)
        if not 0 <= start <= stop <= self.num_rows:
            raise InputError(
                f"{self._name}: rows {start} to {stop} are not in 0 to {self.num_rows}"
            )
        # A lie about the array's size must not take memory: its last row has to be there.
        if stop > start:
            self._open((stop - 1) // self._shard_rows)
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
        done, num_rows, start = 0, len(out), operator.index(start)
        while done < num_rows:
            chunk, first = divmod(start + done, self.chunk_rows)
            take = min(num_rows - done, self.chunk_rows - first)
            piece = out if take == num_rows else out[done : done + take]
            self._read_in_chunk(piece, chunk, first)
            done += take

    def file(self, chunk: int) -> Descriptor | None:
        """The file in which a chunk lies as it is, its rows at `chunk_offset`.

        None where they must be read by `read_into`: if the chunk is compressed, elsewhere, or not
        yet known to be sound.
        """
        number, inner = divmod(chunk, self.chunks_per_shard)
        shard = self._shards.get(number)
        if self._files is None or shard is None or not shard.checked[inner]:
            return None
        return self._files.descriptor(shard.name)

    def check_chunk(self, chunk: int, digest: "hashlib._Hash") -> Array:
        """Read one whole chunk, padding included, and check it; (chunk_rows, *row_shape).

        Its stored bytes go to `digest`. The array is good until this thread reads its next chunk.

        Raises:
            DamagedStoreError: the chunk's bytes are missing or differ from its checksum.
        """
        shard, inner = divmod(chunk, self.chunks_per_shard)
        body = self._load(self._open(shard), inner, digest)
        return body.view(self.dtype).reshape(-1, *self.row_shape)

    def check_index(self, shard: int, digest: "hashlib._Hash") -> None:
        """Read the index of a shard once more, for `digest`.

        Raises:
            DamagedStoreError: the shard is missing.
        """
        opened = self._open(shard)
        index = np.empty(index_bytes(self.chunks_per_shard), np.uint8)
        offset = self._objects.size(opened.name) - len(index)
        if self._objects.read_into(opened.name, offset, index) != len(index):
            raise self._damage(shard, "it ends too early")
        digest.update(index.data)

    def _read_in_chunk(self, out: Array, chunk: int, first: int) -> None:
        number, inner = divmod(chunk, self.chunks_per_shard)
        shard = self._shards.get(number) or self._open(number)
        if self._reads_parts and shard.checked[inner]:
            offset = chunk_offset(inner, first, self.chunk_rows, self._row_bytes)
            if self._objects.read_into(shard.name, offset, out) != out.nbytes:
                raise self._damage(number, "it ends too early")
            return
        start = first * self._row_bytes
        out.reshape(-1).view(np.uint8)[:] = self._load(shard, inner)[start : start + out.nbytes]

    def _load(self, shard: _Shard, inner: int, digest: "hashlib._Hash | None" = None) -> Bytes:
        """The bytes of a chunk, checked, in this thread's buffer."""
        if shard.spans is None:
            size = self._chunk_bytes + CRC_BYTES
            offset = inner * size
        else:
            offset, size = (int(value) for value in shard.spans[inner])
        buffer = self._buffer("raw", size)
        # A copy that a cache kept may be bad where its source is not.
        for _ in range(2):
            found = self._objects.read_into(shard.name, offset, buffer)
            body = buffer[: size - CRC_BYTES]
            is_sound = found == size and crc32c_bytes(body) == buffer[len(body) :].tobytes()
            if is_sound or not self._objects.forget(shard.name, offset, size):
                break
        if found != size:
            raise self._damage(shard.number, "it ends too early")
        if not is_sound:
            raise self._damage(shard.number, f"the checksum of its chunk {inner} does not match")
        if digest is not None:
            digest.update(buffer.data)
        if self._compressor is not None:
            packed, body = body, self._buffer("chunk", self._chunk_bytes)
            if not self._compressor.decompress(packed, body):
                raise self._damage(
                    shard.number, f"its chunk {inner} does not decompress to a chunk", "R-SHARD-5"
                )
        shard.checked[inner] = True
        return body

    def _buffer(self, name: str, size: int) -> Bytes:
        """A buffer of this thread, used again and again."""
        found: Bytes | None = getattr(self._local, name, None)
        if found is None or len(found) < size:
            found = np.empty(size, np.uint8)
            setattr(self._local, name, found)
        return found[:size]

    def _open(self, number: int) -> _Shard:
        """A shard whose size and index are right."""
        with self._lock:
            if (found := self._shards.get(number)) is not None:
                self._shards.move_to_end(number)
                return found
        name = self._spec.object(number)
        try:
            size = self._objects.size(name)
            spans = self._check_index(number, name, size)
        except FileNotFoundError:
            raise self._damage(number, "its file is missing", "R-COMMIT-4") from None
        num_used = -(-self._rows_of(number) // self.chunk_rows)
        shard = _Shard(number, name, np.zeros(num_used, np.bool_), spans)
        with self._lock:
            self._shards[number] = shard
            if spans is not None:
                while len(self._shards) * spans.nbytes > _INDEXES_BYTES and len(self._shards) > 1:
                    self._shards.popitem(last=False)
        return shard

    def _rows_of(self, number: int) -> int:
        return min(self._shard_rows, self.num_rows - number * self._shard_rows)

    def _check_index(self, number: int, name: str, size: int) -> npt.NDArray[np.uint64] | None:
        """Refuse a shard with a wrong size or index; the chunks' spans where they differ."""
        rows = self._rows_of(number)
        num_used = -(-rows // self.chunk_rows)
        length = index_bytes(self.chunks_per_shard)
        if self._compressor is None:
            expected_size = object_bytes(rows, self._row_bytes, self.chunk_rows, self._shard_rows)
            if size != expected_size:
                raise self._damage(number, f"it has {size} bytes, not {expected_size}", "R-SHARD-2")
        elif not length <= size <= MAX_OBJECT_BYTES:
            raise self._damage(
                number, f"it has {size} bytes, and its index alone {length}", "R-SHARD-2"
            )
        index = np.empty(length, np.uint8)
        if self._objects.read_into(name, size - length, index) != length:
            raise self._damage(number, "it ends too early")
        if crc32c_bytes(index[:-CRC_BYTES]) != index[-CRC_BYTES:].tobytes():
            raise self._damage(number, "the checksum of its index does not match")
        spans = index[:-CRC_BYTES].view("<u8").reshape(-1, 2)
        used = spans[:num_used].copy()
        if (used == ABSENT).any() or (spans[num_used:] != ABSENT).any():
            raise self._damage(number, "its index has other chunks than its rows", "R-SHARD-2")
        sizes = used[:, 1]
        if self._compressor is None:
            is_sized = sizes == self._chunk_bytes + CRC_BYTES
        else:
            most = self._compressor.most_bytes(self._chunk_bytes) + CRC_BYTES
            is_sized = (sizes > CRC_BYTES) & (sizes <= most)
        if (
            not is_sized.all()
            or (used[:, 0] != np.cumsum(sizes) - sizes).any()
            or int(sizes.sum()) != size - length
        ):
            raise self._damage(number, "its chunks do not follow one another", "R-SHARD-1")
        return None if self._compressor is None else used

    def _in_its_place(self, name: str) -> str | None:
        head = np.zeros(200, np.uint8)
        try:
            self._objects.read_into(name, 0, head)
        except (FileNotFoundError, StoreError):
            return None
        return in_its_place(head.tobytes())

    def _damage(self, shard: int, what: str, rule: str = "R-SHARD-3") -> DamagedStoreError:
        name = self._spec.object(shard)
        if found := self._in_its_place(name):
            return DamagedStoreError(f"{self._objects.place}/{name} {found}", rule=rule)
        return DamagedStoreError(
            f"{self._objects.place}/{name} (shard {shard} of {self._name}) is damaged: {what}; "
            f"restore it from a copy, or run `mlsae store verify` to see all damage",
            rule=rule,
        )
