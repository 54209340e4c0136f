"""Copying a store: every byte of it, or some layers, sites and rows, or in another encoding."""

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from mlsae.base.directories import held, require_outside_stores
from mlsae.base.errors import InputError
from mlsae.base.interruption import (
    InterruptedWorkError,
    Interruption,
    StopNow,
    interruptible,
)
from mlsae.base.settings import setting, settings
from mlsae.base.units import counted, format_bytes, parse_layers, parse_names, parse_range, portion
from mlsae.store.copying.derive import derive
from mlsae.store.copying.manifest import Manifest
from mlsae.store.copying.mirror import mirror
from mlsae.store.copying.selection import Selection, select
from mlsae.store.copying.target import BucketTarget, DirectoryTarget, StoppedError, Target
from mlsae.store.format.added_fvu import MAX_ADDED_FVU
from mlsae.store.places.objects import LocalObjects, Objects
from mlsae.store.places.remote import is_remote, open_objects, open_writable
from mlsae.store.read.commits import pending_shards
from mlsae.store.read.records import read_plan
from mlsae.store.read.store import Store, open_store
from mlsae.store.schema import SETUP


@settings
class CopyConfig:
    """Settings of a copy."""

    source: str = setting(
        decides=True,
        group="Copy",
        on_command_line=False,
        doc="Directory or URL of a complete store.",
    )
    target: str = setting(
        decides=False,
        group="Copy",
        on_command_line=False,
        doc="Directory, or s3://bucket/prefix for an exact copy of a local store.",
    )
    layers: tuple[int, ...] | None = setting(
        default=None,
        unset="all",
        decides=True,
        group="Copy",
        parse=parse_layers,
        doc="Layers to keep, such as 0-5.",
    )
    sites: tuple[str, ...] | None = setting(
        default=None,
        unset="all",
        decides=True,
        group="Copy",
        parse=parse_names,
        doc="Sites to keep.",
    )
    rows: tuple[int, int] | None = setting(
        default=None,
        unset="all",
        decides=True,
        group="Copy",
        parse=parse_range,
        metavar="ROWS",
        doc="Rows to keep, N or START:STOP; whole sequences.",
    )
    encoding: str | None = setting(
        default=None,
        unset="the source's",
        decides=True,
        group="Copy",
        doc="Encoding of the copy, as for harvest, such as int8 or float16-zstd.",
    )
    max_encoding_fvu: float = setting(
        default=MAX_ADDED_FVU,
        decides=False,
        group="Copy",
        doc="Most FVU that another encoding may add to a shard, in total and in each decile of "
        "row norm.",
    )


@dataclass(frozen=True, kw_only=True)
class CopyResult:
    """A finished copy."""

    store_id: str
    """Id of the copy; an exact copy has the source's."""
    line: str
    """Summary of the copy, for people."""
    notes: tuple[str, ...]
    """Things that were not copied, or were changed."""


def copy(config: CopyConfig, *, progress: bool = False) -> CopyResult:
    """Copy a store, or go on with a copy that was stopped; the same call does both.

    Args:
        config: from where, to where, how much of it.
        progress: show a bar where there is a terminal.

    Raises:
        InputError: the two places do not go together, or the source has no such rows, layers,
            sites.
        StoreError: the source is no store, incomplete or damaged; another store is at the target.
        ResourceError: the disk has no room.
        InterruptedWorkError: SIGINT or SIGTERM came; what is committed stays.
    """
    with interruptible() as interruption:
        try:
            return _copy(config, interruption, progress)
        except (StopNow, StoppedError):
            raise _stopped(config, interruption) from None


def _copy(config: CopyConfig, interruption: Interruption, progress: bool) -> CopyResult:
    began = time.monotonic()
    _check_places(config)
    # Each byte is read about once, so nothing of it is kept.
    source = open_store(config.source, cache_bytes=0)
    selection = select(
        source,
        layers=config.layers,
        sites=config.sites,
        rows=config.rows,
        encoding=config.encoding,
    )
    if selection is None:
        return _mirror(config, source, interruption, progress, began)
    return _derive(config, source, selection, interruption, progress, began)


def _mirror(
    config: CopyConfig, source: Store, interruption: Interruption, progress: bool, began: float
) -> CopyResult:
    is_local = not is_remote(config.target)
    target: Target
    if is_local:
        target = DirectoryTarget(_directory(config.target), is_source_local=source.is_local)
    elif not source.is_local:
        raise InputError(
            f"neither {config.source} nor {config.target} is on this machine; copy to a directory "
            f"first, and from there"
        )
    else:
        target = BucketTarget(open_writable(config.target))
    # Another copy may write the same bytes there; nobody may remove them meanwhile.
    with held(_directory(config.target), shared=True) if is_local else nullcontext():
        found = mirror(Manifest(source), target, interruption, progress=progress)
    if is_local:
        open_store(config.target)
    seconds = time.monotonic() - began
    if found.num_bytes:
        how = f"{format_bytes(found.num_bytes)} in {seconds:.1f} s"
    else:
        how = "it was there already"
    check = "" if is_local else f"; check it with: mlsae store verify {config.target}"
    return CopyResult(
        store_id=source.store_id,
        line=f"copied {source.place} to {config.target}: {_content(source)}, {how}, store_id "
        f"{source.store_id[:12]} as before{check}",
        notes=found.notes,
    )


def _derive(
    config: CopyConfig,
    source: Store,
    selection: Selection,
    interruption: Interruption,
    progress: bool,
    began: float,
) -> CopyResult:
    if is_remote(config.target):
        raise InputError(
            f"{config.target}: a part of a store, or one in another encoding, is made in a "
            f"directory; copy that one to {config.target} then"
        )
    path = _directory(config.target)
    with held(path, shared=True):
        notes = derive(
            source,
            path,
            selection,
            interruption,
            max_added_fvu=config.max_encoding_fvu,
            progress=progress,
        )
    made = open_store(path)
    size = sum(num_bytes for _, num_bytes in made.objects.walk())
    return CopyResult(
        store_id=made.store_id,
        line=f"copied from {source.place} to {path}: {_content(made)}, {format_bytes(size)} in "
        f"{time.monotonic() - began:.1f} s, store_id {made.store_id[:12]}, derived from "
        f"{source.store_id[:12]}",
        notes=notes,
    )


def _check_places(config: CopyConfig) -> None:
    """Refuse places that are one, or of which one is in the other, and places in a store."""
    if is_remote(config.source) or is_remote(config.target):
        if config.source.rstrip("/") == config.target.rstrip("/"):
            raise InputError(f"{config.source} would be copied to itself; give another place")
    else:
        source, target = (_directory(at).resolve() for at in (config.source, config.target))
        if source == target:
            raise InputError(f"{config.source} would be copied to itself; give another directory")
        if source in target.parents or target in source.parents:
            raise InputError(
                f"one of {config.source} and {config.target} lies in the other; give another "
                f"directory"
            )
    if not is_remote(config.target):
        require_outside_stores(_directory(config.target), "the target")


def _directory(location: str | os.PathLike[str]) -> Path:
    return Path(open_objects(location).place)


def _content(store: Store) -> str:
    num_layers, num_sites = len(store.layers), len(store.sites)
    layers = f"each of {counted(num_layers, 'layer')}" if num_layers > 1 else "one layer"
    sites = f" at {counted(num_sites, 'site')}" if num_sites > 1 else ""
    return f"{counted(store.num_rows, 'row')} of {layers}{sites} in {store.plan.preset.name}"


def _stopped(config: CopyConfig, interruption: Interruption) -> InterruptedWorkError:
    """Error for a stopped copy: the objects that are kept, and the way to go on, in one line."""
    assert interruption.signal_number is not None
    objects: Objects
    if is_remote(config.target):
        objects = open_writable(config.target)
    else:
        objects = LocalObjects(_directory(config.target))
    line = "stopped before anything was copied; run the same command to begin again"
    if objects.exists(SETUP):
        plan = read_plan(objects)
        total = plan.num_shards
        done = total - len(pending_shards(objects, plan))
        line = (
            f"stopped: {portion(done, total, 'shard')} safe in {config.target}; "
            f"run the same command to go on"
        )
    return InterruptedWorkError(line, interruption.signal_number)
