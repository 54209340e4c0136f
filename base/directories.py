"""Output directories: whose they are, held by one run at a time, and filled whole.

Nothing here is swapped by name: the directory may be a mount point, or the one that a shell stands
in. New content is made in a folder inside it and moved to its place when it is whole.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from mlsae.base.errors import InputError, ResourceError
from mlsae.base.files import fsync_directory

log = logging.getLogger("mlsae")

LOCK = "lock.partial"
"""File in an output directory that is locked while a run writes there."""
KEPT = "kept.partial"
"""Folder in a staged one for what a stopped run had done, which equal work goes on from."""
_PARTIAL = ".partial"
_STAGED = re.compile(r"(?:new|whole|old)-[0-9a-f]{8}\.partial")
_SYSTEMS_OWN = frozenset(
    {
        ".DS_Store", ".Spotlight-V100", ".Trashes", ".cache", ".directory", ".fseventsd",
        ".git", ".ipynb_checkpoints", ".snapshot", "$RECYCLE.BIN", "System Volume Information",
        "Thumbs.db", "desktop.ini", "lost+found",
    }
)  # fmt: skip
_SYSTEMS_OPENINGS = ("._", ".nfs", ".fuse_hidden", ".Trash-")
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL})
_NO_RENAME = frozenset({errno.EBUSY, errno.EXDEV})


def is_systems_own(name: str) -> bool:
    """True for a name under which systems, browsers of files, git and hubs leave their own."""
    return name in _SYSTEMS_OWN or name.startswith(_SYSTEMS_OPENINGS)


def content_of(directory: Path) -> list[str]:
    """Names in a directory, sorted, without temporary ones and those of the operating system."""
    if not directory.exists():
        return []
    names = (entry.name for entry in directory.iterdir())
    return sorted(n for n in names if not n.endswith(_PARTIAL) and not is_systems_own(n))


def has_staged(directory: Path) -> bool:
    """True where a run was killed while `staged` filled the directory."""
    return directory.is_dir() and any(
        _STAGED.fullmatch(entry.name) for entry in directory.iterdir()
    )


def require_outside_stores(path: str | os.PathLike[str], option: str) -> None:
    """Refuse an output in an activation store, whose files are recorded one by one.

    Args:
        path: file or directory to be written, there or not.
        option: name under which the user gave the path.

    Raises:
        InputError: naming the store and a place beside it.
    """
    place = Path(os.path.realpath(path))
    for folder in place.parents:
        if (folder / "plan.json").is_file() and (folder / "commits").is_dir():
            raise InputError(
                f"{option} {os.fspath(path)} lies in the activation store {folder}, which may hold "
                f"no other files: give a place outside it, such as "
                f"{folder.with_name(f'{folder.name}-{place.name}')}"
            )


@contextmanager
def held(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold an output directory, made where it is absent, until the block ends.

    The lock is the system's own on an open file: it works between containers and, where the file
    system has locks, between machines, and ends with the process however that dies.

    Args:
        directory: the directory; empty folders that were made for it go when the block ends.
        shared: others may hold the directory as well, as processes that write one store.

    Raises:
        InputError: another run holds the directory; the message says which.
        ResourceError: the directory cannot be written.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    lock = None
    try:
        try:
            lock = _lock(directory, shared)
        except PermissionError as error:
            raise _unwritable(directory, error, "change its permissions or ") from error
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            raise _unwritable(directory, error) from error
        yield
    finally:
        if lock is not None:
            _unlock(directory / LOCK, lock)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def require_free(directory: Path) -> None:
    """Require that no run holds a directory, whose content is to be removed.

    Raises:
        InputError: a run does; the message says which.
    """
    if (directory / LOCK).exists():
        os.close(_lock(directory, shared=False))


def _unwritable(directory: Path, error: OSError, remedy: str = "") -> ResourceError:
    cause = (error.strerror or type(error).__name__).lower()
    return ResourceError(f"{directory} cannot be written ({cause}): {remedy}give another directory")


def _lock(directory: Path, shared: bool) -> int:
    path = directory / LOCK
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # Whoever made the directory has removed it again.
            continue
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 1000, 0).decode(errors="replace").strip()
            os.close(fd)
            raise InputError(
                f"{directory} is being written by {holder or 'another run'}: wait until that has "
                f"ended, or stop it, or give another directory"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(fd)
                raise
            log.warning(
                "%s lies on a file system without locks (%s): see to it that no other run writes "
                "there",
                directory,
                error.strerror,
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.stat()):
                break
        # Whoever held it removed the file between the two calls.
        os.close(fd)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    holder = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
    os.ftruncate(fd, 0)
    os.pwrite(fd, holder.encode(), 0)
    return fd


def _unlock(path: Path, fd: int) -> None:
    is_last = True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_last = False
    except OSError:
        pass  # There are no locks here.
    if is_last:
        with suppress(OSError):
            path.unlink()
    os.close(fd)


@contextmanager
def staged(out: Path, last: str = "", *, work: str | None = None) -> Iterator[Path]:
    """A new folder whose content becomes that of `out` when the block ends without an exception.

    After an exception `out` is as it was. A killed process leaves temporary names in `out`, which
    the next run there removes; a replacement that was begun, it first finishes or takes back.

    Args:
        out: directory to be filled, whose content may be replaced; see `content_of`.
        last: name of the entry that makes the content valid: first to go, last to come.
        work: hex digest of all that decides the content. With it, a folder with a folder `KEPT`
            outlives an exception, and the next run of equal work is given it as it was left.

    Raises:
        InputError: another run holds the directory.
        ResourceError: the directory cannot be written, or its content not be replaced.
    """
    out = Path(os.path.realpath(out))
    with held(out):
        token = (work or uuid.uuid4().hex)[:8]
        new, old = out / f"new-{token}.partial", out / f"old-{token}.partial"
        _settle(out, last)
        for entry in list(out.iterdir()):
            if _STAGED.fullmatch(entry.name) and not (entry == new and (new / KEPT).is_dir()):
                shutil.rmtree(entry, ignore_errors=True)
        new.mkdir(exist_ok=True)
        try:
            yield new
            shutil.rmtree(new / KEPT, ignore_errors=True)
            _fsync_all(new)
        except BaseException:
            if work is None or not (new / KEPT).is_dir():
                shutil.rmtree(new, ignore_errors=True)
            raise
        whole = _replace(out, new, old, last)
        fsync_directory(out)
        # In this order: see `_settle`.
        for left in (old, whole):
            shutil.rmtree(left, ignore_errors=True)
        if old.exists():
            log.warning("what %s held before could not be removed whole: delete %s", out, old)


def _replace(out: Path, new: Path, old: Path, last: str) -> Path:
    """Move the content of `out` to `old`, and that of `new` to `out`.

    Returns:
        The name that `new` has got in between, when the former content was out of the way.
    """
    moved: list[Path] = []
    busy = []
    old.mkdir()
    whole = new.with_name(new.name.replace("new-", "whole-", 1))
    try:
        for name in _ordered(content_of(out), last, is_first=True):
            try:
                (out / name).rename(old / name)
                moved.append(old / name)
            except OSError as error:
                if error.errno not in _NO_RENAME or not (out / name).is_dir():
                    raise
                busy.append(out / name)
    except OSError as error:
        for entry in reversed(moved):
            entry.rename(out / entry.name)
        old.rmdir()
        raise _irreplaceable(out, new, error) from error
    new.rename(whole)
    fsync_directory(out)
    try:
        for folder in busy:
            # Another file system is mounted there: its content goes, the folder stays.
            _clear(folder)
        _fill(out, whole, last)
    except OSError as error:
        raise _irreplaceable(out, whole, error) from error
    return whole


def _fill(out: Path, whole: Path, last: str) -> None:
    for name in _ordered((entry.name for entry in whole.iterdir()), last, is_first=False):
        _place(whole / name, out / name)


def _settle(out: Path, last: str) -> None:
    """Finish, or take back, a replacement in which a process was killed."""
    for old in list(out.glob("old-*.partial")):
        if not _STAGED.fullmatch(old.name):
            continue
        if (whole := old.with_name(old.name.replace("old-", "whole-", 1))).exists():
            _fill(out, whole, last)
        elif old.with_name(old.name.replace("old-", "new-", 1)).exists():
            for name in _ordered((entry.name for entry in old.iterdir()), last, is_first=False):
                (old / name).rename(out / name)


def _ordered(names: Iterable[str], last: str, *, is_first: bool) -> list[str]:
    return sorted(names, key=lambda name: ((name == last) != is_first, name))


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _place(source: Path, target: Path) -> None:
    """Move a file or folder, into a folder that is there, and across file systems."""
    if source.is_dir():
        if not target.exists():
            with suppress(OSError):
                source.rename(target)
                return
        target.mkdir(exist_ok=True)
        for entry in sorted(source.iterdir()):
            _place(entry, target / entry.name)
        fsync_directory(target)
        return
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def _irreplaceable(out: Path, new: Path, error: OSError) -> ResourceError:
    token = new.name.removesuffix(_PARTIAL).partition("-")[2]
    kept = new.with_name(f"finished-{token}")
    new.rename(kept)
    return ResourceError(
        f"{error.filename or out} cannot be replaced ({error.strerror}); the new content of {out} "
        f"is finished and lies in {kept}: move it to a directory of its own"
    )


def _fsync_all(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(folder))
