"""Adding activations to a store: rows from their producer to shards that are durable.

The harvest and every other producer write through here. A store is complete, or visibly incomplete
and resumable: each step writes whole files under temporary names and renames them, data before the
record that vouches for it.
"""

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.files import remove_stale_partials
from mlsae.base.machine.priority import yield_to_others
from mlsae.base.units import counted
from mlsae.base.words import Key
from mlsae.store.errors import ActivationError, NotAStoreError, NotFiniteError
from mlsae.store.format.added_fvu import MAX_ADDED_FVU, AddedFVU, check_added_fvu
from mlsae.store.format.encoding import Stored
from mlsae.store.format.moments import GROUPS, GroupMoments, eligible_groups
from mlsae.store.places.objects import LocalObjects
from mlsae.store.read.commits import Producers, pending_shards
from mlsae.store.read.records import Producer, read_plan
from mlsae.store.read.rowindex import RowIndex
from mlsae.store.read.setup import read_calibration, site_codecs
from mlsae.store.schema import (
    COMPLETE,
    SETUP,
)
from mlsae.store.write.completion import complete
from mlsae.store.write.given import Rows, as_rows
from mlsae.store.write.openshard import OpenShard

_LEAST_WRITER_THREADS, MOST_WRITER_THREADS = 2, 8
"""Least and most threads that hash and write: one a core in between. More would keep a fast disk no
busier, and several ranks may share a machine."""
_FLUSHING_THREADS = 3
"""Threads that flush, and so only wait for the disk."""
Array = npt.NDArray[Any]


class Writer:
    """Adds activations to a store, shard by shard; each full shard is committed durably.

    Rows are written by threads while the caller computes the next, and a full shard is made durable
    while the next one fills. In memory lie the arrays of the last two calls of `append` or `write`
    and, for each of at most two shards, its moments.

    Use as a context manager: leaving it completes the store if every shard is committed, and an
    exception drops the unfinished shard only.
    """

    def __init__(
        self,
        path: Path,
        *,
        producer: Producer | None = None,
        allow_mixed: bool = False,
        max_added_fvu: float = MAX_ADDED_FVU,
        cached: bool = True,
    ) -> None:
        self._objects = LocalObjects(path)
        plan = read_plan(self._objects)
        if not (path / SETUP).exists():
            raise NotAStoreError(f"{path}: the tokens are not all written; create the store first")
        self.path = path
        self.plan = plan
        self.plan_id = plan.id
        self._index = RowIndex(self._objects, plan)
        self.num_rows = plan.num_rows
        self.rows_per_sequence = plan.rows_per_sequence
        """Row r belongs to sequence r // rows_per_sequence."""
        self.shard_rows = plan.shard_rows
        self.num_shards = plan.num_shards
        self.bytes_written = 0
        """Bytes of activation objects this writer has committed."""
        self._producer = producer
        self._producers = None if allow_mixed else Producers(self._objects, plan)
        self._require_one_producer()
        self._encoding = plan.encoding
        self._keys = list(plan.keys)
        self._codecs = site_codecs(plan, read_calibration(self._objects, plan))
        self._parts = plan.parts
        self._max_added_fvu = max_added_fvu
        self._cached = cached
        self._added: dict[Key, AddedFVU] = {}
        remove_stale_partials(path)
        num_threads = min(max(_LEAST_WRITER_THREADS, os.cpu_count() or 1), MOST_WRITER_THREADS)
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="store-write", initializer=yield_to_others
        )
        # Threads apart, so that waiting for the disk never holds up the next shard's rows.
        self._flushers = ThreadPoolExecutor(_FLUSHING_THREADS, thread_name_prefix="store-flush")
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="store-commit")
        self._batch: _Batch | None = None
        # Rows of the open shard, by group, whose moments `end_shard` is to be given.
        self._owed_G = np.zeros(len(GROUPS), np.int64)
        self._open: OpenShard | None = None
        self._committing: tuple[int, Future[None]] | None = None
        self._closed = False
        self._shard: int | None = None
        self._row = 0
        self._go_to_next_pending()

    @property
    def position(self) -> int | None:
        """Row that the next call of `append` begins with; None when nothing is pending."""
        return None if self._shard is None else self._row

    def row_tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """(stop − start,) index of the token that each row belongs to."""
        return self._index.tokens(start, stop)

    def row_groups(self, start: int, stop: int) -> npt.NDArray[np.int8]:
        """(stop − start,) index into `mlsae.store.format.moments.GROUPS` of each row."""
        return self._index.groups(start, stop)

    def shard_range(self, shard: int) -> range:
        """Rows of a shard."""
        return self.plan.shard(shard)

    def pending(self) -> list[int]:
        """Shards that no process has committed yet, as the disk says now.

        Raises:
            MixedProducersError: another producer has committed one.
            ActivationError, ResourceError: as for `append`, of a shard that was being committed.
        """
        self._finish_batch()
        self._finish_commit()
        self._require_one_producer()
        return pending_shards(self._objects, self.plan)

    def seek(self, shard: int) -> None:
        """Go to the first row of a shard; an unfinished shard is dropped.

        Raises:
            InputError: there is no such shard.
        """
        if not 0 <= shard < self.num_shards:
            raise InputError(f"{self.path}: shard {shard} is not in 0 to {self.num_shards - 1}")
        self._drop()
        self._shard, self._row = shard, self.shard_range(shard).start

    def append(self, activations: Mapping[Key, Rows]) -> None:
        """Add rows of every (site, layer) at `position`; a shard that becomes full is ended.

        Threads check and write the rows while the caller computes the next batch. The arrays stay
        the caller's, who may fill them again.

        Args:
            activations: (site, layer) → (num_rows, d_model) floats, or values of the stored data
                type; for int8 a pair of (num_rows, d_model) and (num_rows, blocks) int8. Any number
                of rows, as arrays, lists, or tensors of torch.

        Raises:
            ActivationError: values that are not finite or too large for the encoding (they may be
                those of the call before), a wrong shape, a missing or unknown (site, layer), or an
                encoding that adds too much FVU.
            InputError: more rows than the store has.
            MixedProducersError: another producer has committed a shard meanwhile.
            ResourceError: the disk is full.
        """
        activations = as_rows(activations)
        num_rows = self._check_shapes(activations)
        start = 0
        while start < num_rows:
            if self._shard is None:
                raise InputError(
                    f"{self.path} has all {counted(self.num_rows, 'row')}, "
                    f"{num_rows - start} too many"
                )
            room = self.shard_range(self._shard).stop - self._row
            stop = min(num_rows, start + room)
            some = slice(start, stop)
            self._write(activations, some, self._shard, moments_follow=False, is_lent=True)
            if stop - start == room:
                self.end_shard()
            start = stop

    def write(self, activations: Mapping[Key, Rows], *, moments_follow: bool = False) -> None:
        """Add rows as `append` does, but of the shard in hand alone, and leave it open.

        The arrays belong to the writer until the next call has returned (or the writer is closed),
        so a caller with two sets of buffers may use them in turn.

        Args:
            activations: argument of `append`; no more rows than the shard has room for.
            moments_follow: `end_shard` will be given the moments of these rows; they are computed
                here otherwise.

        Raises:
            InputError: the shard has less room.
            ActivationError, MixedProducersError, ResourceError: as for `append`.
        """
        activations = as_rows(activations)
        num_rows = self._check_shapes(activations)
        room = 0 if self._shard is None else self.shard_range(self._shard).stop - self._row
        if self._shard is None or num_rows > room:
            raise InputError(
                f"{self.path}: got {counted(num_rows, 'row')}, but shard {self._shard} "
                f"ends after {room}; write the rows of one shard at a time, and end it"
            )
        self._write(activations, slice(0, num_rows), self._shard, moments_follow=moments_follow)

    def end_shard(
        self,
        moments: Mapping[str, GroupMoments] | None = None,
        added_fvu: Mapping[str, Any] | None = None,
    ) -> None:
        """Commit the shard in hand, whose rows are all written, and go to the next pending one.

        Args:
            moments: site → moments of the decoded stored values, for rows that were written with
                `moments_follow`; None where there are none.
            added_fvu: site → layer (decimal) → result of `added_fvu` for the whole shard; None for
                the writer's own measurement, which covers floats that the encoding changes: for
                int8 all rows, otherwise the shard's first call.

        Raises:
            InputError: rows are missing, or the moments belong to other rows.
            ActivationError: the moments are not finite; else as for `append`, of the rows before.
            ResourceError: the disk is full.
        """
        if self._open is None or self._row < self.shard_range(self._open.shard).stop:
            raise InputError(f"{self.path}: shard {self._shard} is not full")
        self._check_moments(moments or {}, self._open.shard)
        written = [] if self._batch is None else self._batch.futures
        self._hand_over(self._open, written, moments or {}, added_fvu or self._measured())
        self._open = None
        self._owed_G[:] = 0
        self._go_to_next_pending()

    def drain(self) -> None:
        """Wait until the rows of the last `append` are written, though not yet durable.

        For a caller that needs the cores of the threads that write.

        Raises:
            ActivationError, ResourceError: the rows are refused as `append` refuses them.
        """
        self._finish_batch()

    def close(self) -> None:
        """Stop writing; complete the store if every shard is committed by now.

        Raises:
            StoreError, ResourceError: as for `append`, from rows that were still being written.
        """
        if not self._closed:
            try:
                if not self.pending():
                    # Files of processes that shared the work and were killed meanwhile.
                    remove_stale_partials(self.path)
                    if not (self.path / COMPLETE).exists():
                        complete(self.path, self.plan)
            finally:
                self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._stop()

    def _check_shapes(self, activations: Mapping[Key, Rows]) -> int:
        if activations.keys() != set(self._keys):
            raise ActivationError(
                f"{self.path}: expected activations of {self._keys}, got {sorted(activations)}"
            )
        first = activations[self._keys[0]]
        num_rows = len(first[0] if isinstance(first, tuple) else first)
        for (site, layer), rows in activations.items():
            widths = [part.width for part in self._parts]
            given = rows if isinstance(rows, tuple) else (rows,)
            if not isinstance(rows, tuple):
                widths = widths[:1]
            elif any(a.dtype != part.dtype for a, part in zip(rows, self._parts, strict=False)):
                raise ActivationError(
                    f"stored values of {site} layer {layer} must be of "
                    f"{', '.join(part.dtype.name for part in self._parts)}, got "
                    f"{', '.join(values.dtype.name for values in rows)}"
                )
            if [values.shape for values in given] != [(num_rows, width) for width in widths]:
                raise ActivationError(
                    f"activations of {site} layer {layer} must have shape "
                    f"{' and '.join(str((num_rows, width)) for width in widths)}, got "
                    f"{' and '.join(str(values.shape) for values in given)}"
                )
        return num_rows

    def _encode(self, key: Key, rows: Rows, some: slice, *, is_lent: bool) -> Stored:
        """Stored values of some rows; the cost of the encoding is measured on the way.

        Args:
            key: site and layer.
            rows: all rows of a call.
            some: those to be encoded.
            is_lent: the caller may change the rows before they are written: a copy is made.
        """
        if isinstance(rows, tuple):
            parts = tuple(values[some] for values in rows)
            return tuple(part.copy() for part in parts) if is_lent else parts
        site, layer = key
        values, codec = rows[some], self._codecs[site]
        index = self.plan.layers.index(layer)
        try:
            stored = codec.encode(values, index)
        except NotFiniteError:
            raise self._not_finite(key, values, self._row) from None
        is_first = self._shard is not None and self._row == self.shard_range(self._shard).start
        if values.dtype.kind == "f" and values.dtype != stored[0].dtype:
            if is_first:
                self._added[key] = AddedFVU()
            if key in self._added and (is_first or self._encoding == "int8"):
                groups = self._index.groups(self._row, self._row + len(values))
                chosen = groups >= eligible_groups(1)[0]
                with np.errstate(invalid="ignore", over="ignore"):
                    decoded = codec.decode(stored, index)
                    self._added[key].add(values[chosen], decoded[chosen])
        if is_lent and np.may_share_memory(stored[0], values):
            return tuple(part.copy() for part in stored)
        return stored

    def _write(
        self,
        activations: Mapping[Key, Rows],
        some: slice,
        shard: int,
        *,
        moments_follow: bool,
        is_lent: bool = False,
    ) -> None:
        stored = {
            key: self._encode(key, activations[key], some, is_lent=is_lent) for key in self._keys
        }
        stop = self._row + some.stop - some.start
        groups = self._index.groups(self._row, stop)
        # Waiting here, and not after submitting, overlaps writing with the caller's next batch.
        self._finish_batch()
        if self._open is None:
            self._open = OpenShard(self.path, self.plan, shard, self._codecs, cached=self._cached)
        if moments_follow:
            self._owed_G += np.bincount(groups, minlength=len(GROUPS))
        jobs = self._open.jobs(stored, None if moments_follow else groups)
        futures = [self._pool.submit(job) for job in jobs]
        self._batch = _Batch(stored, self._row, futures)
        self._row = stop

    def _check_moments(self, moments: Mapping[str, GroupMoments], shard: int) -> None:
        sites = set(self.plan.sites) if self._owed_G.any() else set()
        if moments.keys() != sites:
            raise InputError(
                f"{self.path}: expected moments of {sorted(sites)}, got {sorted(moments)}"
            )
        for site, of_site in moments.items():
            if not np.array_equal(of_site.count_G, self._owed_G):
                raise InputError(
                    f"{self.path}: the moments of {site} count "
                    f"{counted(int(of_site.count_G.sum()), 'row')}, but not those of shard "
                    f"{shard}, group by group; give moments of exactly the rows appended without"
                )
            if not of_site.is_finite():
                self._explain_not_finite(self._batch, shard)

    def _measured(self) -> dict[str, dict[str, Any]] | None:
        """Cost of the encoding in the shard, where floats were appended."""
        if not self._added:
            return None
        added: dict[str, dict[str, Any]] = {}
        for (site, layer), measured in self._added.items():
            added.setdefault(site, {})[str(layer)] = measured.result()
        self._added = {}
        return added

    def _explain_not_finite(self, batch: "_Batch | None", shard: int) -> NoReturn:
        for (site, layer), parts in () if batch is None else batch.stored.items():
            values = self._codecs[site].decode(parts, self.plan.layers.index(layer))
            if batch is not None and not np.isfinite(values).all():
                raise self._not_finite((site, layer), values, batch.first_row)
        raise ActivationError(
            f"{self.path}: the moments of shard {shard} are not finite: they overflowed where they "
            "were computed, or an earlier row is not"
        )

    def _not_finite(self, key: Key, values: Array, first_row: int) -> ActivationError:
        finite = np.isfinite(values)
        if finite.all():
            largest_N = np.abs(values).max(axis=1)
            return ActivationError(
                f"layer {key[1]} ({key[0]}), row {first_row + int(largest_N.argmax())}: a value of "
                f"magnitude {largest_N.max():.5g} lies too far from its channel's mean for "
                f"{self._encoding}; use another --encoding"
            )
        row = first_row + int(np.flatnonzero(~finite.all(axis=1))[0])
        largest = float(np.abs(values[finite]).max(initial=0.0))
        too_large = self._encoding == "float16" and bool(np.isinf(values).any())
        return ActivationError(
            f"layer {key[1]} ({key[0]}), row {row}: a value is not finite in {self._encoding}; "
            f"the largest finite magnitude of that batch is {largest:.5g}"
            + ("; use --encoding bfloat16 for values over 65,504" if too_large else "")
        )

    def _finish_batch(self) -> None:
        """Wait until the batch of the last call is written; raise its error, if any."""
        if (batch := self._batch) is None:
            return
        wait(batch.futures)
        self._batch = None
        try:
            for future in batch.futures:
                future.result()
        except NotFiniteError:
            self._explain_not_finite(batch, batch.first_row // self.shard_rows)

    def _hand_over(
        self,
        full: OpenShard,
        written: list[Future[None]],
        moments: Mapping[str, GroupMoments],
        added_fvu: Mapping[str, Any] | None,
    ) -> None:
        """Commit a full shard in another thread, one shard at a time."""
        self._finish_commit()

        def commit() -> None:
            try:
                for future in written:
                    future.result()
                self._require_one_producer()
                if added_fvu is not None:
                    check_added_fvu(added_fvu, full.shard, self._encoding, self._max_added_fvu)
                num_bytes = full.commit(self._flushers, self._producer, moments, added_fvu)
            finally:
                full.abandon()
            self.bytes_written += num_bytes

        self._committing = (full.shard, self._committer.submit(commit))

    def _finish_commit(self) -> None:
        if self._committing is not None:
            future = self._committing[1]
            wait([future])
            self._committing = None
            future.result()

    def _require_one_producer(self) -> None:
        if self._producers is not None:
            self._producers.require_one(self._producer)

    def _go_to_next_pending(self) -> None:
        own = None if self._committing is None else self._committing[0]
        pending = [shard for shard in pending_shards(self._objects, self.plan) if shard != own]
        later = [shard for shard in pending if self._shard is None or shard > self._shard]
        self._shard = next(iter(later or pending), None)
        self._row = 0 if self._shard is None else self.shard_range(self._shard).start

    def _stop(self) -> None:
        if not self._closed:
            self._closed = True
            self._drop()
            # The committer waits for the others, so it goes first.
            for pool in (self._committer, self._flushers, self._pool):
                pool.shutdown()

    def _drop(self) -> None:
        """Let go of the unfinished shard; one that is full is committed all the same."""
        if self._open is not None:
            batch, self._batch = self._batch, None
            wait([] if batch is None else [f for f in batch.futures if not f.cancel()])
            self._open.abandon()
            self._open = None
        self._owed_G[:] = 0
        self._added = {}


@dataclass
class _Batch:
    """Rows of one call within one shard, and the work that is under way for them."""

    stored: dict[Key, Stored]
    first_row: int
    futures: list[Future[None]]
