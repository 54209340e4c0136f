"""Removal of a store: nothing but a store, and no remainder that passes for one."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlsae.base.directories import LOCK, is_systems_own, require_free
from mlsae.base.errors import InputError
from mlsae.base.files import DamagedFileError, fsync_directory, read_sealed
from mlsae.base.units import counted, format_bytes, format_ranges
from mlsae.base.words import SITES
from mlsae.store.errors import NotAStoreError
from mlsae.store.places.remote import is_remote, open_objects
from mlsae.store.schema import (
    ACTIVATIONS,
    ARRAY_METADATA,
    BLOCK_EXPONENTS,
    CHANNEL_MEAN,
    CHANNEL_SCALE,
    COMMITS,
    COMPLETE,
    IGNORED,
    MOMENTS,
    PARTIAL,
    PLAN,
    PROVENANCE,
    ROW_TOKEN,
    SHARD_MOMENTS,
    TOKEN_ARRAYS,
)

_NAMED = 5
"""Most foreign files that a message names."""
_ROOT = "|".join(
    re.escape(name) for name in sorted({PLAN, COMPLETE, MOMENTS, ARRAY_METADATA, LOCK, *IGNORED})
)
_SITE = "|".join(SITES)
_NAME = re.compile(
    rf"(?:{_ROOT}"
    rf"|(?:{'|'.join((*TOKEN_ARRAYS, ROW_TOKEN))})/(?:zarr\.json|c\.\d+)"
    rf"|(?:{ACTIVATIONS}|{BLOCK_EXPONENTS})(?:/(?:{_SITE})(?:/\d+)?)?/zarr\.json"
    rf"|(?:{ACTIVATIONS}|{BLOCK_EXPONENTS})/(?:{_SITE})/\d+/c\.\d+\.0"
    rf"|(?:{CHANNEL_MEAN}|{CHANNEL_SCALE})(?:/(?:{_SITE}))?/zarr\.json"
    rf"|(?:{CHANNEL_MEAN}|{CHANNEL_SCALE})/(?:{_SITE})/c\.0\.0"
    rf"|{COMMITS}/(?:setup|\d{{5,}})\.json"
    rf"|{SHARD_MOMENTS}/\d{{5,}}\.safetensors"
    rf"|{PROVENANCE}/[^/]+\.json)(?:\.[^/]+{re.escape(PARTIAL)})?"
)
"""Names of a store's files, those that are being written included."""
_FOLDER = re.compile(
    rf"(?:{'|'.join((*TOKEN_ARRAYS, ROW_TOKEN, COMMITS, SHARD_MOMENTS, PROVENANCE))}"
    rf"|(?:{ACTIVATIONS}|{BLOCK_EXPONENTS})(?:/(?:{_SITE})(?:/\d+)?)?"
    rf"|(?:{CHANNEL_MEAN}|{CHANNEL_SCALE})(?:/(?:{_SITE}))?)"
)


@dataclass(frozen=True, kw_only=True)
class Removable:
    """A directory that holds a store, or the rest of one, and nothing else."""

    path: Path
    files: tuple[str, ...]
    """Names; the target of a link is left alone."""
    folders: tuple[str, ...]
    """Names, inner ones first."""
    description: str
    """Description of the store, for the question whether to remove it."""


def find_removable(location: str | os.PathLike[str]) -> Removable:
    """Look at a store that is to be removed, complete or not, sound or damaged; change nothing.

    Raises:
        InputError: the location is not on this machine, or is a link.
        NotAStoreError: the directory is no store, or holds other files too; they are named.
    """
    if is_remote(location):
        raise InputError(
            f"{os.fspath(location)} is not on this machine; remove it with the tools of that place"
        )
    path = Path(open_objects(location).place)
    if path.is_symlink():
        raise InputError(
            f"{path} is a link to {path.resolve()}; give that directory, then the link"
        )
    record = _recorded_plan(path)
    folders, files, foreign, num_bytes = [], [], [], 0
    for name, is_folder, size in _walk(path):
        num_bytes += size
        if is_systems_own(name.rpartition("/")[2]) and not is_folder:
            files.append(name)
        elif (_FOLDER if is_folder else _NAME).fullmatch(name) is None:
            foreign.append(name)
        elif is_folder:
            folders.append(name)
        else:
            files.append(name)
    if foreign:
        shown = ", ".join(sorted(foreign)[:_NAMED])
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        raise NotAStoreError(
            f"{path} holds other files than those of a store: {shown}{more}; nothing was removed: "
            f"move them away first"
        )
    state = "complete" if COMPLETE in files else "incomplete"
    return Removable(
        path=path,
        files=tuple(files),
        folders=tuple(sorted(folders, key=lambda name: name.count("/"), reverse=True)),
        description=f"{path}: {state} store{_content(record)}, {format_bytes(num_bytes)}",
    )


def remove(found: Removable) -> None:
    """Remove a store; killed at any instant, the rest is visibly incomplete.

    Raises:
        InputError: a process writes the store.

    Records go before the data they vouch for, because a harvest into the rest would take shards
    with a record for safe. The plan goes last, so that the rest can still be told for a
    store, and removed.
    """
    require_free(found.path)
    records = [name for name in found.files if name.startswith(f"{COMMITS}/")]
    last = {COMPLETE, PLAN, *records}
    for names, folder in (
        ([COMPLETE], found.path),
        (records, found.path / COMMITS),
        ([name for name in found.files if name not in last], None),
    ):
        for name in names:
            (found.path / name).unlink(missing_ok=True)
        if folder is not None and folder.exists():
            fsync_directory(folder)
    for name in found.folders:
        (found.path / name).rmdir()
    (found.path / PLAN).unlink()
    # The working directory of a process loses its name only.
    found.path.resolve().rmdir()


def _recorded_plan(path: Path) -> Mapping[str, Any]:
    """JSON of a store's plan, unchecked: stores of every version are removed, and damaged ones.

    Returns:
        Keys and values as they are in the file; none if it is damaged.

    Raises:
        NotAStoreError: the file is missing, or belongs to another kind of directory.
    """
    record: dict[str, Any] = {}
    try:
        record = read_sealed(path / PLAN)
    except (FileNotFoundError, NotADirectoryError):
        raise NotAStoreError(
            f"{path} is not an activation store: it has no {PLAN}; nothing was removed"
        ) from None
    except DamagedFileError:
        pass
    if "schema_version" in record or _has_our_group(path):
        return record
    raise NotAStoreError(
        f"{path} is not an activation store: its {PLAN} is not the plan of a store; nothing was "
        f"removed"
    )


def _has_our_group(path: Path) -> bool:
    """True if the Zarr metadata say that this is a store, where the plan cannot."""
    try:
        return "plan_id" in json.loads((path / ARRAY_METADATA).read_bytes())["attributes"]["mlsae"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _walk(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(name, whether it is a folder, bytes) for all there is; links count as empty files."""
    for entry in os.scandir(path):
        if entry.is_dir(follow_symlinks=False):
            yield entry.name, True, 0
            for name, is_folder, size in _walk(path / entry.name):
                yield f"{entry.name}/{name}", is_folder, size
        else:
            is_link = entry.is_symlink()
            yield entry.name, False, 0 if is_link else entry.stat(follow_symlinks=False).st_size


def _content(record: Mapping[str, Any]) -> str:
    """Tokens, sites, layers and encoding of a store, or nothing where the record lacks one."""
    try:
        return (
            f" of {counted(record['num_tokens'], 'token')}, {', '.join(record['sites'])} of "
            f"layers {format_ranges(record['layers'])} in {record['encoding']}"
        )
    except (KeyError, TypeError, ValueError):
        return ""
