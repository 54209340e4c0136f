"""Files that survive a crash: written whole or not at all, and JSON that carries its checksum."""

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlsae.base.errors import InputError, ResourceError

SEAL = "sha256"
Location = str | os.PathLike[str]
"""A directory, or a URL: file://, https://, s3:// or hf://datasets/…"""

_SUBSTITUTES = (
    (b"version https://git-lfs.github.com/", "a Git LFS pointer", "run `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer", "run `git annex get`"),
    (b"<!doctype html", "a web page", "check the address, which may ask for a login"),
    (b"<html", "a web page", "check the address, which may ask for a login"),
)
"""First bytes, in lower case, of things that lie in the place of a file, and the way to it."""
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})


def local_path(name: Location) -> Path:
    """A path, with `~` at its beginning replaced by the home directory, where that is known."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - pathlib's raises where it is not.


class DamagedFileError(InputError):
    """A file of this package does not hold the bytes that were written."""


@contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Turn the error of a full disk, met while `path` is written, into one line for the user.

    Raises:
        ResourceError: the disk or the user's quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"the disk is full: {path} could not be written; what was finished before is safe, "
            f"free some space and run the same command again"
        ) from error


def fsync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def partial_path(path: Path) -> Path:
    """A temporary name beside `path`, with its owner: `….<host>-<pid>-<hex>.partial`."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f"{path.name}.{owner}.partial")


def open_partial(path: Path) -> tuple[Path, int]:
    """Begin a file under a temporary name beside `path`, and hold it while it is open.

    Whoever begins it renames it first and closes it then: closed, it is stale to others.

    Returns:
        The temporary name, and a descriptor for writing.
    """
    while True:
        partial = partial_path(path)
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Somebody who looks for stale files has it, and is about to remove it.
            os.close(fd)
            continue
        except OSError:
            # A file system without locks has none to tell a live writer by; nothing is removed.
            return partial, fd
        if os.fstat(fd).st_nlink:
            return partial, fd
        # That somebody came and went between the two calls.
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write bytes to a descriptor, at its place, without a buffer that a full disk would leave."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def remove_stale_partials(directory: Path) -> None:
    """Remove the temporary files that dead processes of this machine left below `directory`.

    A live process holds its files by a lock, which the system lets go of when it dies: numbers of
    processes are others in other containers.
    """
    ours = re.compile(rf".*\.{re.escape(socket.gethostname())}-\d+-[0-9a-f]+\.partial")
    for folder, _, names in os.walk(directory):
        for name in names:
            if ours.fullmatch(name):
                _remove_stale(Path(folder, name))


def _remove_stale(partial: Path) -> None:
    # Gone already, another user's, or in use.
    with suppress(OSError):
        fd = os.open(partial, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()
        finally:
            os.close(fd)


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file, fsync and rename.

    After a crash at any instant `path` holds its old content or `data`, never a mixture.

    Raises:
        ResourceError: the disk is full; `path` is as it was.
    """
    with _written(path, data) as partial:
        partial.rename(path)
    fsync_directory(path.parent)


def write_new_durably(path: Path, data: bytes) -> bool:
    """Write a new file as `write_durably` does, never over another, not even of the same instant.

    Returns:
        True if `path` was written, False where there was a file.

    Raises:
        ResourceError: the disk is full; `path` is as it was.
    """
    with _written(path, data) as partial:
        try:
            path.hardlink_to(partial)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A file system without links has nothing better: look, then rename.
            if path.exists():
                return False
            partial.rename(path)
    fsync_directory(path.parent)
    return True


@contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """A temporary file beside `path` that holds `data` durably; gone when the block ends."""
    with full_disk_explained(path):
        partial, fd = open_partial(path)
    try:
        with full_disk_explained(path):
            write_all(fd, data)
            os.fsync(fd)
        yield partial
    finally:
        os.close(fd)
        partial.unlink(missing_ok=True)


def canonical_json(value: Any) -> bytes:
    """Canonical bytes of a JSON value: sorted keys, no spaces, ASCII, no NaN or infinity."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def seal(content: Mapping[str, Any]) -> bytes:
    """Canonical JSON of `content` with one more key, `sha256`, over the canonical JSON of the rest.

    Raises:
        ValueError: `content` has a key `sha256` already.
    """
    if SEAL in content:
        raise ValueError(f"content to be sealed has a key {SEAL!r} already")
    digest = hashlib.sha256(canonical_json(content)).hexdigest()
    return canonical_json({**content, SEAL: digest}) + b"\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a sealed JSON file and check every byte of it; the seal is taken off.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: any byte differs from what `seal` wrote.
    """
    return parse_sealed(path.read_bytes(), str(path))


def parse_sealed(data: bytes, where: str) -> dict[str, Any]:
    """Check sealed JSON and return its content; `where` names it in the message.

    Raises:
        DamagedFileError: any byte differs from what `seal` wrote.
    """
    digest = None
    try:
        content = json.loads(data)
        digest = content.pop(SEAL)
        intact = seal(content) == data
    # Brackets nested without end exhaust the parser's stack.
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact and (found := in_its_place(data)):
        raise DamagedFileError(f"{where} {found}, or make it again")
    if not intact:
        raise DamagedFileError(
            f"{where} is damaged: its content does not match its checksum "
            f"{str(digest)[:12]!r}; restore the file from a copy or make it again"
        )
    return dict(content)


def in_its_place(head: bytes) -> str | None:
    """Predicate and remedy for content that stands for a file and is no damage of it; else None.

    Args:
        head: first bytes of the file, 100 or more where it has them.
    """
    start = head[:200].lstrip().lower()
    for opening, thing, remedy in _SUBSTITUTES:
        if start.startswith(opening):
            return f"is {thing} in place of the file: {remedy}"
    return None


def stand_in(path: Path) -> str | None:
    """Predicate and remedy for a file that stands for another, as `in_its_place`; else None."""
    try:
        with path.open("rb") as file:
            return in_its_place(file.read(200))
    except OSError:
        return None


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
