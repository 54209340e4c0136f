"""A bounded local copy of parts that were read from remote stores.

    <directory>/chunks/lock                    bytes held by all files below, in decimal digits
    <directory>/chunks/partial                 bytes being written
    <directory>/chunks/<store>/<xx>/<key>      bytes of one part of an object, then their checksum

Whoever adds or makes room holds the lock; a process that is killed lets go of it, and the next one
overwrites what it had begun.
"""

import errno
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from mlsae.store.places.objects import Objects
from mlsae.store.schema import COMPLETE, CRC_BYTES

log = logging.getLogger("mlsae")

_FOLDER = "chunks"
_KEPT = 0.9
"""Share of the bytes that may be held that is left when room is made."""


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/mlsae`, else `~/.cache/mlsae`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mlsae"


class ChunkCache:
    """Parts of objects by key, the least recently used of which go first. Processes may share it.

    It is never needed: where the directory cannot be written, nothing more is kept, and one warning
    says so.

    Args:
        directory: where; made when first needed.
        max_bytes: most bytes of its files together.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._root = directory / _FOLDER
        self._lock = threading.Lock()
        self._is_writable = True

    def __reduce__(self) -> tuple[Any, ...]:
        """Processes share the directory."""
        return ChunkCache, (self.directory, self.max_bytes)

    def get(self, store: str, key: str, out: npt.NDArray[np.uint8]) -> bool:
        """Fill `out` with the bytes put under a key.

        Returns:
            False where nothing is there, or other bytes; `out` then holds anything.
        """
        try:
            fd = os.open(self._path(store, key), os.O_RDONLY)
        except OSError:
            return False
        checksum = bytearray(CRC_BYTES + 1)
        try:
            is_whole = os.preadv(fd, [out.data, checksum], 0) == out.nbytes + CRC_BYTES
            # A cache that this user can only read serves as well.
            with suppress(OSError):
                os.utime(fd)
        except OSError:
            is_whole = False
        finally:
            os.close(fd)
        if is_whole and checksum[:CRC_BYTES] == _checksum(store, key, out):
            return True
        self.forget(store, key)
        return False

    def put(self, store: str, key: str, data: npt.NDArray[np.uint8]) -> None:
        """Keep a copy of `data`, making room for it where need be."""
        num_bytes = data.nbytes + CRC_BYTES
        if not self._is_writable or num_bytes > _KEPT * self.max_bytes:
            return
        path = self._path(store, key)
        try:
            with self._locked() as lock:
                if not path.exists():
                    self._add(lock, path, [data.data, _checksum(store, key, data)])
        except OSError as error:
            with self._lock:
                is_first, self._is_writable = self._is_writable, False
            if is_first:
                log.warning(
                    "%s cannot be written (%s): what is read of remote stores is not kept from "
                    "here on; free some space, or name another directory with --cache-dir",
                    self.directory,
                    error.strerror,
                )

    def forget(self, store: str, key: str) -> bool:
        """Drop the bytes put under a key; True if there were any."""
        try:
            self._path(store, key).unlink()
        except OSError:
            return False
        return True

    def _path(self, store: str, key: str) -> Path:
        folder = hashlib.sha256(store.encode()).hexdigest()[:16]
        name = hashlib.sha256(key.encode()).hexdigest()[:40]
        return self._root / folder / name[:2] / name[2:]

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Descriptor of the lock's file, while nobody else adds or removes."""
        with self._lock:
            self._root.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                yield fd
            finally:
                os.close(fd)

    def _add(self, lock: int, path: Path, parts: list[Any]) -> None:
        num_bytes = sum(len(part) for part in parts)
        digits = os.pread(lock, 32, 0)
        held = int(digits) if digits.isdigit() else self._make_room(self.max_bytes)
        if held + num_bytes > self.max_bytes:
            held = self._make_room(int(_KEPT * self.max_bytes) - num_bytes)
        # Counted before it is there: where a process is killed in between, too much is counted,
        # and the next one that finds no room counts anew.
        _write_count(lock, held + num_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._root / "partial"
        try:
            with partial.open("wb", buffering=0) as file:
                if os.writev(file.fileno(), parts) != num_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _make_room(self, max_bytes: int) -> int:
        """Remove the least recently used parts until at most `max_bytes` are held.

        Returns:
            Bytes that are held then.
        """
        found = []
        # Only files that were put here are ever removed.
        for path in self._root.glob(f"{'[0-9a-f]' * 16}/[0-9a-f][0-9a-f]/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        held = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held <= max_bytes:
                break
            path.unlink(missing_ok=True)
            held -= size
        return held


class CachedObjects:
    """Objects from elsewhere, of which every part that was read is kept.

    A part belongs to one state of one store: the place, and the `complete.json` that was read
    from it. Before that was read, and of a store that has none, nothing is.

    Args:
        objects: from elsewhere.
        cache: where parts are kept.
    """

    is_local = False

    def __init__(self, objects: Objects, cache: ChunkCache) -> None:
        self.place = objects.place
        self.cache = cache
        self._objects = objects
        self._store: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads for itself, and has the cache in common."""
        return CachedObjects, (self._objects, self.cache)

    def read(self, name: str, limit: int) -> bytes:
        """See `Objects`."""
        data = self._objects.read(name, limit)
        if name == COMPLETE:
            self._store = f"{self.place} {hashlib.sha256(data).hexdigest()}"
        return data

    def read_into(self, name: str, offset: int, out: npt.NDArray[Any]) -> int:
        """See `Objects`."""
        if self._store is None:
            return self._objects.read_into(name, offset, out)
        raw = out.reshape(-1).view(np.uint8)
        key = _key(name, offset, out.nbytes)
        if self.cache.get(self._store, key, raw):
            return out.nbytes
        count = self._objects.read_into(name, offset, out)
        if count == out.nbytes:
            self.cache.put(self._store, key, raw)
        return count

    def forget(self, name: str, offset: int, num_bytes: int) -> bool:
        """See `Objects`."""
        return self._store is not None and self.cache.forget(
            self._store, _key(name, offset, num_bytes)
        )

    def size(self, name: str) -> int:
        """See `Objects`."""
        return self._objects.size(name)

    def exists(self, name: str) -> bool:
        """See `Objects`."""
        return self._objects.exists(name)

    def walk(self) -> Iterator[tuple[str, int]]:
        """See `Objects`."""
        return self._objects.walk()


def _key(name: str, offset: int, num_bytes: int) -> str:
    return f"{name} {offset} {num_bytes}"


def _checksum(store: str, key: str, data: npt.NDArray[np.uint8]) -> bytes:
    """CRC-32C over place and bytes, so that no file passes for another."""
    whose = google_crc32c.value(f"{store} {key}".encode())
    return int(google_crc32c.extend(whose, data)).to_bytes(CRC_BYTES, "little")


def _write_count(lock: int, num_bytes: int) -> None:
    os.pwrite(lock, str(num_bytes).encode(), 0)
    os.ftruncate(lock, len(str(num_bytes)))
