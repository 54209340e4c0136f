"""Bytes of a store: objects by name, in a local directory or elsewhere.

A name is a path inside the store, such as `commits/setup.json`. Everything that reads a store goes
through `Objects`, so that one reader serves every place.
"""

import errno
import os
import resource
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mlsae.store.errors import DamagedStoreError

Bytes = npt.NDArray[np.uint8]


class Objects(Protocol):
    """The objects of one store. Threads may share it."""

    place: str
    """Directory or URL, as messages name it."""
    is_local: bool
    """True where reading a part of an object costs no more than its bytes."""

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of an object.

        Args:
            name: name of the object.
            limit: most bytes that it may have.

        Raises:
            FileNotFoundError: there is no such object.
            DamagedStoreError: the object is larger than `limit`; nothing was read then.
            RemoteError: the place cannot be reached.
        """
        ...

    def read_into(self, name: str, offset: int, out: npt.NDArray[Any]) -> int:
        """Fill a C-contiguous array with the bytes of an object from `offset` on.

        Returns:
            Bytes read: fewer than `out` holds only where the object ends.

        Raises:
            FileNotFoundError: there is no such object.
            RemoteError: the place cannot be reached.
        """
        ...

    def forget(self, name: str, offset: int, num_bytes: int) -> bool:
        """Drop a copy that was kept of these bytes, because they are wrong.

        Returns:
            True if there was one, so that reading again may help.
        """
        ...

    def size(self, name: str) -> int:
        """Bytes of an object.

        Raises:
            FileNotFoundError: there is no such object.
            RemoteError: the place cannot be reached.
        """
        ...

    def exists(self, name: str) -> bool:
        """True if there is such an object.

        Raises:
            RemoteError: the place cannot be reached.
        """
        ...

    def walk(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every object, in no order.

        Raises:
            RemoteError: the place cannot be reached, or does not list its objects.
        """
        ...


class LocalObjects:
    """A store in a directory of this machine."""

    is_local = True

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place = str(directory)
        self._prefix = f"{directory}/"
        self._limit = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._open: dict[str, Descriptor] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens files of its own."""
        return LocalObjects, (self.directory,)

    def read(self, name: str, limit: int) -> bytes:
        """See `Objects`."""
        with open(_open_file(self._prefix + name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise too_large(self.place, name, size, limit)
            return file.read()

    def read_into(self, name: str, offset: int, out: npt.NDArray[Any]) -> int:
        """See `Objects`."""
        descriptor = self.descriptor(name)
        done, num_bytes = 0, out.nbytes
        # One call reads at most 2 GiB, and may be interrupted.
        while done < num_bytes:
            view = out.reshape(-1).view(np.uint8)[done:].data if done else out.data
            count = os.preadv(descriptor.number, [view], offset + done)
            if count == 0:
                break
            done += count
        return done

    def forget(self, name: str, offset: int, num_bytes: int) -> bool:  # noqa: ARG002
        """Nothing is kept of objects on this machine."""
        return False

    def size(self, name: str) -> int:
        """See `Objects`."""
        return os.fstat(self.descriptor(name).number).st_size

    def exists(self, name: str) -> bool:
        """See `Objects`."""
        return (self.directory / name).exists()

    def walk(self) -> Iterator[tuple[str, int]]:
        """See `Objects`."""
        for path in self.directory.rglob("*"):
            if not path.is_dir():
                yield str(path).removeprefix(self._prefix), path.lstat().st_size

    def descriptor(self, name: str) -> "Descriptor":
        """An object, open for reading.

        Raises:
            FileNotFoundError: there is no such object.
        """
        # Without the lock, and without a note of who was used last: reads are in random order, so
        # the oldest is as good to close as any other.
        if (found := self._open.get(name)) is not None:
            return found
        with self._lock:
            if (found := self._open.get(name)) is None:
                found = self._open[name] = Descriptor(self._prefix + name)
                # Well under the process's limit, which others need too.
                if len(self._open) > self._limit:
                    del self._open[next(iter(self._open))]
            return found


class Descriptor:
    """A file descriptor that closes when its last user lets go of it."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = _open_file(path)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _open_file(path: str) -> int:
    """A descriptor for files alone: a pipe would be waited for, a device never end.

    Raises:
        FileNotFoundError: there is nothing.
        DamagedStoreError: something else is there.
    """
    is_file = False
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        is_file = stat.S_ISREG(os.fstat(number).st_mode)
        if not is_file:
            os.close(number)
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    except OSError as error:
        # A link to nowhere, a link to itself, a socket.
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENXIO) or (
            error.errno == errno.ENOENT and not Path(path).is_symlink()
        ):
            raise
    if not is_file:
        raise DamagedStoreError(f"{path} is not a file; restore it from a copy", rule="R-LAYOUT-3")
    return number


def too_large(place: str, name: str, size: int, limit: int) -> DamagedStoreError:
    """The error of an object that has more bytes than it may."""
    return DamagedStoreError(
        f"{place}: {name} has {size} bytes, over the {limit} that it may have here; restore it "
        f"from a copy"
    )
