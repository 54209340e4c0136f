"""A store made from another: some layers, sites and sequences of it, or another encoding.

It is written as any producer's store is, so it can be killed and gone on with; it has a plan and a
store_id of its own, and names the store it was derived from.
"""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mlsae import __version__
from mlsae.base.files import seal, write_durably
from mlsae.base.interruption import Interruption
from mlsae.base.output.console import Progress
from mlsae.store.copying.rows import ChosenRows
from mlsae.store.copying.selection import Selection
from mlsae.store.copying.target import StoppedError
from mlsae.store.errors import DamagedStoreError, InvalidStoreError, RemoteError, StoreError
from mlsae.store.format.encoding import parts_of
from mlsae.store.format.layout import SHARD_BYTES
from mlsae.store.read.records import read_complete, read_sealed_object
from mlsae.store.read.store import Store
from mlsae.store.schema import TOKEN_ARRAYS, is_provenance
from mlsae.store.write.create import create
from mlsae.store.write.writer import Writer

STOPPING = "finishing the shard in hand, then stopping; press Ctrl-C again to stop at once"


def derive(
    source: Store,
    path: Path,
    selection: Selection,
    interruption: Interruption,
    *,
    max_added_fvu: float,
    progress: bool = True,
) -> tuple[str, ...]:
    """Make a store from a part of another, or in another encoding; or go on with one.

    Args:
        source: complete.
        path: directory of the new store.
        selection: part of the source to copy, and its encoding.
        interruption: says between shards whether to stop.
        max_added_fvu: most that another encoding may add to a shard.
        progress: show a bar, or lines where there is no terminal.

    Returns:
        Things that could not be copied.

    Raises:
        StoreError: another store is at `path`; the source is damaged, or changed meanwhile; the
            encoding adds too much FVU.
        ResourceError: the disk has no room.
        StoppedError: the user asked to stop; the shards that are committed stay.
    """
    chosen = ChosenRows(source, selection)
    with chosen, _begin(source, path, selection, chosen, max_added_fvu) as writer:
        notes = _copy_provenance(source, path)
        pending = writer.pending()
        num_rows = sum(len(writer.shard_range(shard)) for shard in pending)
        parts = parts_of(selection.encoding, source.d_model)
        num_arrays = len(selection.sites) * len(selection.layers)
        row_bytes = num_arrays * sum(part.row_bytes for part in parts)
        with (
            Progress("copy", num_rows * row_bytes, "B", shown=progress) as shown,
            interruption.deferred(STOPPING),
        ):
            try:
                for shard in pending:
                    if interruption.requested:
                        break
                    writer.seek(shard)
                    rows = writer.shard_range(shard)
                    for start, stop in chosen.spans(rows):
                        writer.write(chosen.read(start, stop))
                        shown.update((stop - start) * row_bytes)
                    writer.end_shard(added_fvu=chosen.known_cost(rows))
                left = writer.pending()
            except (DamagedStoreError, InvalidStoreError):
                _require_unchanged(source, path)
                raise
        _require_unchanged(source, path)
    if left:
        raise StoppedError
    return notes


def _begin(
    source: Store, path: Path, selection: Selection, chosen: ChosenRows, max_added_fvu: float
) -> Writer:
    first, stop = (number * source.context_length for number in selection.sequences)
    keep = source.plan.keep_positions
    shard_bytes = source.shard_rows * source.parts[0].row_bytes
    if source.shard_rows >= source.num_rows:
        shard_bytes = max(shard_bytes, SHARD_BYTES)
    return create(
        path,
        tokens=_Tokens(source.tokens, "tokens", first, stop).array(),
        documents=_Tokens(source.documents, "documents", first, stop).array(),
        token_flags=_Tokens(source.token_flags, "token_flags", first, stop).array(),
        context_length=source.context_length,
        layers=selection.layers,
        d_model=source.d_model,
        sites=selection.sites,
        encoding=selection.encoding,
        compression=selection.compression,
        calibration=chosen.calibration(),
        # The cost of values that are kept as they are was accepted when they were made.
        max_added_fvu=math.inf if chosen.keeps_values else max_added_fvu,
        batch_sequences=source.plan.batch_sequences,
        keep_positions=None if keep is None else keep.num,
        keep_seed=0 if keep is None else keep.seed,
        source=source.source,
        derived_from={
            "store_id": source.store_id,
            "sequences": list(selection.sequences),
            "encoding": source.encoding,
            "derived_from": source.plan.derived_from,
        },
        provenance={
            "kind": "copy",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "source": source.place,
            "versions": {"mlsae": __version__, "numpy": np.__version__},
        },
        producer={"copy by mlsae": __version__, "numpy": np.__version__},
        allow_mixed=True,
        shard_bytes=shard_bytes,
    )


class _Tokens:
    """Some values of a stored array, as an array that is read when it is sliced.

    Texts may be longer than memory.
    """

    def __init__(
        self, read: Callable[[int, int], npt.NDArray[Any]], name: str, first: int, stop: int
    ) -> None:
        self._read = read
        self._first = first
        self.shape = (stop - first,)
        self.dtype = np.dtype(TOKEN_ARRAYS[name])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, some: slice) -> npt.NDArray[Any]:
        start, stop, _ = some.indices(len(self))
        return self._read(self._first + start, self._first + stop)

    def array(self) -> npt.NDArray[Any]:
        """Itself, as an array."""
        return cast("npt.NDArray[Any]", self)


def _copy_provenance(source: Store, path: Path) -> tuple[str, ...]:
    """Copy the records of the runs that made the source; return obstacles, if any."""
    try:
        names = [name for name, _ in source.objects.walk() if is_provenance(name)]
    except RemoteError as error:
        return (f"provenance was not copied: {error}",)
    for name in names:
        write_durably(path / name, seal(read_sealed_object(source.objects, name)))
    return ()


def _require_unchanged(source: Store, path: Path) -> None:
    """Refuse to complete a copy whose source was replaced by another store meanwhile."""
    try:
        is_same = read_complete(source.objects, source.plan_id).store_id == source.store_id
    except StoreError:
        is_same = False
    if not is_same:
        raise DamagedStoreError(
            f"{source.place} changed while it was copied; {path} stays incomplete: remove it with "
            f"`mlsae store rm {path}` and copy again"
        )
