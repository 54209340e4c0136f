"""Making a store: `create` fixes the plan and writes the tokens, `Writer.append` adds activations.

The harvest and every other producer write through here. A store is complete, or visibly incomplete
and resumable: each step writes whole files under temporary names and renames them, data before the
record that vouches for it.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.files import seal, write_durably
from mlsae.base.resources import require_disk
from mlsae.store.commit import commit_shard, complete, num_shards_of, pending_shards
from mlsae.store.encoding import STORED_DTYPE, check_encoding, decode, encode
from mlsae.store.errors import ActivationError, NotAStoreError, PlanMismatchError
from mlsae.store.layout import SHARD_BYTES, plan_layout
from mlsae.store.moments import Block, GroupMoments, group_of_rows
from mlsae.store.plan import find_plan, make_plan, plan_id_of, read_plan, token_arrays
from mlsae.store.schema import (
    COMPLETE,
    PLAN,
    PROVENANCE,
    SETUP,
    activation_array,
    chunk_key,
    describe_difference,
)
from mlsae.store.setup import token_readers, write_setup
from mlsae.store.shardfile import ShardFile, remove_stale_partials

WRITER_THREADS = 3
Array = npt.NDArray[Any]
Key = tuple[str, int]


def create(
    path: str | os.PathLike[str],
    *,
    tokens: npt.NDArray[np.integer[Any]],
    context_length: int,
    layers: Sequence[int],
    d_model: int,
    sites: Sequence[str] = ("resid_post",),
    documents: npt.NDArray[np.integer[Any]] | None = None,
    token_flags: npt.NDArray[np.uint8] | None = None,
    encoding: str = "float16",
    batch_sequences: int = 1,
    source: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> "Writer":
    """Begin a store, or continue one of the same plan.

    Args:
        path: directory of the store; absent, empty, or holding a store of the same plan.
        tokens: (num_tokens,) token ids, whole sequences of `context_length` one after another.
        context_length: tokens of a sequence.
        layers: 0-based block indices, ascending.
        d_model: channels of an activation.
        sites: where in a block the activations are taken.
        documents: (num_tokens,) index of each token's document; the sequence's index if not given.
        token_flags: (num_tokens,) bits SPECIAL, PADDING, MASKED; 0 if not given.
        encoding: float16, bfloat16 or float32.
        batch_sequences: sequences that the producer computes at once; shards hold whole batches.
        source: JSON that says what made the values; it belongs to the plan and so to `plan_id`.
        provenance: JSON that says how this run was made; recorded outside `plan_id`.
        shard_bytes: bytes of one shard object, about.

    Returns:
        A writer at the first row that is not yet committed.

    Raises:
        InputError: an argument is out of range.
        PlanMismatchError: the directory holds a store of another plan.
        NotAStoreError: the directory holds something else.
        DamagedStoreError: the directory holds a store whose plan is damaged.
        ResourceError: the disk has no room for the store.
    """
    path = Path(path)
    arrays = token_arrays(tokens, documents, token_flags, context_length)
    shape: dict[str, Any] = {
        "context_length": context_length,
        "layers": layers,
        "sites": sites,
        "d_model": d_model,
        "encoding": check_encoding(encoding),
        "batch_sequences": batch_sequences,
        "shard_bytes": shard_bytes,
    }
    plan = make_plan(arrays, source=source or {}, **shape)
    present = find_plan(path)
    if present is None:
        total_bytes = plan_layout(num_tokens=len(tokens), **shape).total_bytes
        require_disk(path, total_bytes, "the store", "harvest fewer tokens or layers")
        path.mkdir(parents=True, exist_ok=True)
        write_durably(path / PLAN, seal(plan))
    elif present != plan:
        lines = describe_difference(plan, present)
        raise PlanMismatchError(
            f"{path} holds a store of another plan ({'; '.join(lines[:3])}); "
            f"give the settings it was made with, or another directory"
        )
    if not (path / SETUP).exists():
        write_setup(path, plan, arrays)
    if provenance is not None:
        write_durably(path / PROVENANCE / f"{uuid.uuid4().hex}.json", seal(provenance))
    return Writer(path)


def resume(path: str | os.PathLike[str]) -> "Writer":
    """Continue a store whose tokens are written, by whatever process.

    Raises:
        NotAStoreError: there is no store, or its tokens are not all written yet.
        StoreError: the store is damaged or of another version.
    """
    return Writer(Path(path))


class Writer:
    """Adds activations to a store, shard by shard; each full shard is committed durably.

    Use as a context manager: leaving it completes the store if every shard is committed, and an
    exception drops the unfinished shard only.
    """

    def __init__(self, path: Path) -> None:
        plan = read_plan(path)
        if not (path / SETUP).exists():
            raise NotAStoreError(f"{path}: the tokens are not all written; create the store first")
        self.path = path
        self.plan = plan
        self.plan_id = plan_id_of(plan)
        self.num_rows: int = plan["num_tokens"]
        self.shard_rows: int = plan["shard_rows"]
        self.num_shards = num_shards_of(plan)
        self.bytes_written = 0
        """Bytes of activation objects this writer has committed."""
        self._encoding = check_encoding(plan["encoding"])
        self._layers = tuple(plan["layers"])
        self._keys: list[Key] = [(s, layer) for s in plan["sites"] for layer in self._layers]
        self._flags = token_readers(path, plan)["token_flags"]
        for key in self._keys:
            remove_stale_partials(path / activation_array(*key))
        self._pool = ThreadPoolExecutor(WRITER_THREADS, thread_name_prefix="store-writer")
        self._futures: list[Future[None]] = []
        self._blocks: dict[str, Block] = {}
        self._moments: dict[str, GroupMoments] = {}
        self._files: dict[Key, ShardFile] = {}
        self._closed = False
        self._shard: int | None = None
        self._row = 0
        self._go_to_next_pending()

    @property
    def position(self) -> int | None:
        """The row that the next `append` begins with; None when nothing is pending."""
        return None if self._shard is None else self._row

    def shard_range(self, shard: int) -> range:
        """Rows of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.num_rows))

    def pending(self) -> list[int]:
        """Shards that no process has committed yet, as the disk says now."""
        return pending_shards(self.path, self.plan)

    def seek(self, shard: int) -> None:
        """Go to the first row of a shard; an unfinished shard is dropped.

        Raises:
            InputError: there is no such shard.
        """
        if not 0 <= shard < self.num_shards:
            raise InputError(f"{self.path}: shard {shard} is not in 0 to {self.num_shards - 1}")
        self._drop()
        self._shard, self._row = shard, self.shard_range(shard).start

    def append(self, activations: Mapping[Key, Array]) -> None:
        """Add rows of every (site, layer) at `position`.

        The arrays belong to the writer from now on: threads check and write them while the caller
        computes the next batch.

        Args:
            activations: (site, layer) → (num_rows, d_model) floats, or values of the stored data
                type. Any number of rows; a shard that becomes full is committed.

        Raises:
            ActivationError: values that are not finite or too large for the encoding (they may be
                those of the call before), a wrong shape, a missing or unknown (site, layer).
            InputError: more rows than the store has.
            ResourceError: the disk is full.
        """
        num_rows = self._check_shapes(activations)
        start = 0
        while start < num_rows:
            if self._shard is None:
                raise InputError(
                    f"{self.path}: all {self.num_rows} rows are there, {num_rows - start} too many"
                )
            take = min(num_rows - start, self.shard_range(self._shard).stop - self._row)
            self._append_within_shard(activations, slice(start, start + take), self._shard)
            start += take

    def close(self) -> None:
        """Stop writing; complete the store if every shard is committed by now."""
        if not self._closed:
            self._closed = True
            self._drop()
            self._pool.shutdown()
            if not self.pending() and not (self.path / COMPLETE).exists():
                complete(self.path, self.plan)

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
        elif not self._closed:
            self._closed = True
            self._drop()
            self._pool.shutdown()

    def _check_shapes(self, activations: Mapping[Key, Array]) -> int:
        if activations.keys() != set(self._keys):
            raise ActivationError(
                f"{self.path}: expected activations of {self._keys}, got {sorted(activations)}"
            )
        num_rows = len(activations[self._keys[0]])
        for (site, layer), values in activations.items():
            if values.shape != (num_rows, self.plan["d_model"]):
                raise ActivationError(
                    f"activations of {site} layer {layer} must have shape "
                    f"({num_rows}, {self.plan['d_model']}), got {values.shape}"
                )
        return num_rows

    def _append_within_shard(
        self, activations: Mapping[Key, Array], rows: slice, shard: int
    ) -> None:
        stored = [encode(activations[key][rows], self._encoding) for key in self._keys]
        # Waiting here, and not after submitting, overlaps writing with the caller's next batch.
        self._finish_block()
        if not self._files:
            self._begin(shard)
        first, num_rows = self._row, rows.stop - rows.start
        positions = np.arange(first, first + num_rows) % self.plan["context_length"]
        group = group_of_rows(self._flags.read(first, first + num_rows), positions)
        self._blocks = {site: moments.block(group) for site, moments in self._moments.items()}
        self._futures = [
            self._pool.submit(self._consume, place, stored, first)
            for place in range(len(self._keys))
        ]
        self._row += num_rows
        if self._row == self.shard_range(shard).stop:
            self._commit(shard)

    def _consume(self, place: int, stored: list[Array], first_row: int) -> None:
        site, layer = self._keys[place]
        index = place % len(self._layers)
        values = self._decode_finite(stored[place], site, layer, first_row)
        is_last = index + 1 == len(self._layers)
        above = None if is_last else decode(stored[place + 1], self._encoding)
        self._blocks[site].add_layer(index, values, above)
        self._files[site, layer].write(np.ascontiguousarray(stored[place]))

    def _decode_finite(
        self, stored: Array, site: str, layer: int, first_row: int
    ) -> npt.NDArray[np.float32]:
        values = decode(stored, self._encoding)
        finite = np.isfinite(values)
        if not finite.all():
            row = first_row + int(np.flatnonzero(~finite.all(axis=1))[0])
            largest = float(np.abs(values[finite]).max(initial=0.0))
            too_large = self._encoding == "float16" and bool(np.isinf(values).any())
            raise ActivationError(
                f"layer {layer} ({site}), row {row}: a value is not finite in {self._encoding}; "
                f"the largest finite magnitude of that batch is {largest:.5g}"
                + ("; use --encoding bfloat16 for values over 65,504" if too_large else "")
            )
        return values

    def _begin(self, shard: int) -> None:
        row_bytes = self.plan["d_model"] * STORED_DTYPE[self._encoding].itemsize
        for key in self._keys:
            self._files[key] = ShardFile(
                self.path / activation_array(*key) / chunk_key(shard, 2),
                row_bytes=row_bytes,
                chunk_rows=self.plan["chunk_rows"],
                shard_rows=self.shard_rows,
            )
        self._moments = {
            site: GroupMoments(self._layers, self.plan["d_model"]) for site in self.plan["sites"]
        }

    def _finish_block(self) -> None:
        futures, self._futures = self._futures, []
        for future in futures:
            future.result()
        for site, block in self._blocks.items():
            self._moments[site].merge(block)
        self._blocks = {}

    def _commit(self, shard: int) -> None:
        self._finish_block()
        digests = self._pool.map(lambda key: self._files[key].commit(), self._keys)
        objects = {
            f"{activation_array(*key)}/{chunk_key(shard, 2)}": digest
            for key, digest in zip(self._keys, digests, strict=True)
        }
        commit_shard(self.path, self.plan, shard, objects, self._moments)
        self.bytes_written += sum(file.num_bytes for file in self._files.values())
        self._files = {}
        self._go_to_next_pending()

    def _go_to_next_pending(self) -> None:
        pending = self.pending()
        later = [shard for shard in pending if self._shard is None or shard > self._shard]
        self._shard = next(iter(later or pending), None)
        self._row = 0 if self._shard is None else self.shard_range(self._shard).start

    def _drop(self) -> None:
        for future in self._futures:
            future.cancel()
        for future in self._futures:
            if not future.cancelled():
                future.exception()
        self._futures, self._blocks = [], {}
        for file in self._files.values():
            file.abandon()
        self._files = {}
