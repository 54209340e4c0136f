"""Target of an exact copy, a directory or a bucket: only checked objects arrive there."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Event
from typing import Protocol

import numpy as np

from mlsae.base.files import (
    fsync_directory,
    full_disk_explained,
    in_its_place,
    open_partial,
    remove_stale_partials,
    sha256_file,
    write_all,
    write_durably,
)
from mlsae.base.machine.resources import require_disk
from mlsae.store.copying.manifest import Item
from mlsae.store.errors import DamagedStoreError, NotAStoreError
from mlsae.store.format.layout import MAX_OBJECT_BYTES
from mlsae.store.places.objects import LocalObjects, Objects
from mlsae.store.places.remote import WritableObjects
from mlsae.store.plan import Plan
from mlsae.store.read.records import read_plan
from mlsae.store.schema import PLAN
from mlsae.store.write.plan import find_plan

_PIECE_BYTES = 2**23
Progress = Callable[[int], None]
"""Told of bytes that have arrived; called by several threads."""


class StoppedError(Exception):
    """Somebody else failed, or the user wants to stop at once."""


class Target(Protocol):
    """A place that objects are copied to. Threads may share it."""

    objects: Objects
    """Objects at the target."""
    workers: int
    """Objects to copy at once."""

    def plan(self) -> Plan | None:
        """The plan of the store that is there, None where one may be begun.

        Raises:
            NotAStoreError: something else is there.
        """
        ...

    def require_room(self, names: Iterable[str], num_bytes: int) -> None:
        """Refuse objects that take `num_bytes`, less those of them that are there already.

        Raises:
            ResourceError: the disk has no room for them.
        """
        ...

    def begin(self) -> None:
        """Make ready, and remove partial files that killed copies on this machine left."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Write a small object; durable when this returns."""
        ...

    def receive(self, item: Item, source: Objects, progress: Progress, stop: Event) -> None:
        """Copy an object; durable when this returns.

        Raises:
            DamagedStoreError: the source does not have the bytes that were recorded; nothing of
                that name has arrived then.
            StoppedError: `stop` was set.
            ResourceError, RemoteError: the disk is full, the place cannot be reached.
        """
        ...


class DirectoryTarget:
    """A directory of this machine."""

    def __init__(self, path: Path, *, is_source_local: bool) -> None:
        self.path = path
        self.objects: Objects = LocalObjects(path)
        # Time goes into hashing here, into waiting for answers elsewhere.
        self.workers = 3 if is_source_local else 8

    def plan(self) -> Plan | None:
        """See `Target`."""
        return find_plan(self.path)

    def require_room(self, names: Iterable[str], num_bytes: int) -> None:
        """See `Target`."""
        paths = (self.path / name for name in names)
        present = sum(path.stat().st_size for path in paths if path.exists())
        require_disk(self.path, num_bytes - present, "the copy", "free some, or copy less")

    def begin(self) -> None:
        """See `Target`."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_stale_partials(self.path)

    def put(self, name: str, data: bytes) -> None:
        """See `Target`."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, data)

    def receive(self, item: Item, source: Objects, progress: Progress, stop: Event) -> None:
        """See `Target`."""
        path = self.path / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A killed copy left it: whole under its name, but its shard has no record yet.
        if path.exists() and sha256_file(path) == item.sha256:
            progress(path.stat().st_size)
            return
        partial, fd = open_partial(path)
        try:
            with full_disk_explained(path):
                for piece in _checked(source, item, stop):
                    write_all(fd, piece)
                    progress(len(piece))
                os.fsync(fd)
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        fsync_directory(path.parent)


class BucketTarget:
    """A bucket, which takes files of this machine."""

    workers = 4

    def __init__(self, objects: WritableObjects) -> None:
        self.objects: Objects = objects
        self._objects = objects

    def plan(self) -> Plan | None:
        """See `Target`."""
        if self.objects.exists(PLAN):
            return read_plan(self.objects)
        for name, _ in self.objects.walk():
            raise NotAStoreError(
                f"{self.objects.place} is not empty and holds no store (it has {name}); give "
                f"another prefix"
            )
        return None

    def require_room(self, names: Iterable[str], num_bytes: int) -> None:
        """See `Target`. A bucket has no end."""

    def begin(self) -> None:
        """See `Target`. An object that was in hand is not to be seen in a bucket."""

    def put(self, name: str, data: bytes) -> None:
        """See `Target`."""
        self._objects.put(name, data)

    def receive(self, item: Item, source: Objects, progress: Progress, stop: Event) -> None:
        """See `Target`."""
        path = Path(source.place) / item.name
        before = _identity(path)
        for _ in _checked(source, item, stop):
            pass
        self._objects.put_file(item.name, path)
        if _identity(path) != before:
            raise DamagedStoreError(
                f"{path} changed while it was copied; run the same command again"
            )
        progress(before[1])


def _checked(source: Objects, item: Item, stop: Event) -> Iterator[memoryview]:
    """The bytes of an object, piece by piece; at their end they were those that were recorded."""
    digest, offset, head = hashlib.sha256(), 0, b""
    buffer = np.empty(_PIECE_BYTES, np.uint8)
    count = _PIECE_BYTES
    while count == _PIECE_BYTES and offset <= MAX_OBJECT_BYTES:
        if stop.is_set():
            raise StoppedError
        try:
            count = source.read_into(item.name, offset, buffer)
        except FileNotFoundError:
            raise _damage(source, item, "is missing, but named by") from None
        head = head or buffer[:200].tobytes()
        digest.update(buffer[:count].data)
        yield buffer[:count].data
        offset += count
    if digest.hexdigest() != item.sha256:
        if found := in_its_place(head[:offset]):
            raise DamagedStoreError(f"{source.place}/{item.name} {found}; nothing of it was copied")
        raise _damage(source, item, "is damaged: its SHA-256 is not that in")


def _damage(source: Objects, item: Item, what: str) -> DamagedStoreError:
    return DamagedStoreError(
        f"{source.place}/{item.name} {what} {item.record}; nothing of it was copied: restore it "
        f"from a copy, then run the same command again",
        rule="R-COMMIT-4",
    )


def _identity(path: Path) -> tuple[int, int, int]:
    """Number, bytes and time of a file, which change when the file does."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
