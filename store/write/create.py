"""Beginning a store, or continuing one: the plan is fixed and the tokens are written."""

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mlsae.base.directories import require_outside_stores
from mlsae.base.files import fsync_directory, seal, write_durably, write_new_durably
from mlsae.base.machine.resources import require_disk
from mlsae.base.units import parse_path, whole
from mlsae.store.errors import PlanMismatchError
from mlsae.store.format.added_fvu import MAX_ADDED_FVU
from mlsae.store.format.calibration import Calibration
from mlsae.store.format.encoding import check_encoding
from mlsae.store.format.layout import SHARD_BYTES, plan_layout
from mlsae.store.read.records import Producer
from mlsae.store.schema import PLAN, PROVENANCE, SETUP
from mlsae.store.write.given import as_array, as_json
from mlsae.store.write.plan import find_plan, make_plan
from mlsae.store.write.setup import write_setup
from mlsae.store.write.tokens import TokenArrays
from mlsae.store.write.writer import Writer


def create(
    path: str | os.PathLike[str],
    *,
    tokens: npt.ArrayLike,
    context_length: int,
    layers: Sequence[int],
    d_model: int,
    sites: Sequence[str] = ("resid_post",),
    documents: npt.ArrayLike | None = None,
    token_flags: npt.ArrayLike | None = None,
    encoding: str = "float16",
    compression: str = "none",
    calibration: Calibration | None = None,
    max_added_fvu: float = MAX_ADDED_FVU,
    batch_sequences: int = 1,
    keep_positions: int | None = None,
    keep_seed: int = 0,
    source: Mapping[str, Any] | None = None,
    derived_from: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    producer: Producer | None = None,
    allow_mixed: bool = False,
    shard_bytes: int = SHARD_BYTES,
    cached: bool = True,
) -> Writer:
    """Begin a store, or continue one of the same plan.

    Args:
        path: directory of the store; absent, empty, or holding a store of the same plan.
        tokens: (num_tokens,) token ids, whole sequences of `context_length` one after another: an
            array, list or tensor. Memory maps of this and the next two are read block by block and
            never held whole.
        context_length: tokens of a sequence.
        layers: 0-based block indices, ascending.
        d_model: channels of an activation.
        sites: where in a block the activations are taken.
        documents: (num_tokens,) index of each token's document; the sequence's index if not given.
        token_flags: (num_tokens,) bits SPECIAL, PADDING, MASKED; 0 if not given.
        encoding: float16, bfloat16, float32 or int8.
        compression: none or zstd, of the activations.
        calibration: result of a `Calibrator` on the first eligible rows; for int8 alone.
        max_added_fvu: the encoding may add so much FVU to a shard, in total and in each decile of
            row norm; measured where floats are appended that the encoding changes.
        batch_sequences: sequences that the producer computes at once; shards hold whole batches.
        keep_positions: store only so many positions of each sequence, chosen by `keep_seed`; all
            if not given. `Writer.row_tokens` says which tokens the rows belong to.
        keep_seed: seed of that choice.
        source: JSON on the origin of the values; it belongs to the plan and so to `plan_id`.
        derived_from: for a store made from another, an object with its `store_id`.
        provenance: JSON that says how this run was made; recorded outside `plan_id`.
        producer: JSON object that names the device and the versions that decide the last bits of
            the values; recorded by shard, outside `plan_id`.
        allow_mixed: add to shards of another producer.
        shard_bytes: bytes of one shard object, about.
        cached: leave written bytes in the page cache, for whoever reads them next. Where the CPU
            has better to do, False lets Linux drop it (from 6.14 on, not on every file system).

    Returns:
        A writer at the first row that is not yet committed.

    Raises:
        InputError: an argument is out of range.
        PlanMismatchError: the directory holds a store of another plan.
        NotAStoreError: the directory holds something else.
        DamagedStoreError: the directory holds a store whose plan is damaged.
        MixedProducersError: another producer made some of its shards.
        ResourceError: the disk has no room for the store.
    """
    path = Path(parse_path(os.fspath(path)))
    require_outside_stores(path, "the store")
    context_length = whole("context_length", context_length)
    keep_seed = whole("keep_seed", keep_seed)
    tokens = as_array("tokens", tokens)
    arrays = TokenArrays(
        tokens,
        None if documents is None else as_array("documents", documents),
        None if token_flags is None else as_array("token_flags", token_flags),
        context_length,
    )
    shape: dict[str, Any] = {
        "context_length": context_length,
        "layers": tuple(whole("a layer", layer) for layer in layers),
        "sites": (sites,) if isinstance(sites, str) else sites,
        "d_model": whole("d_model", d_model),
        "encoding": check_encoding(encoding),
        "batch_sequences": whole("batch_sequences", batch_sequences),
        "shard_bytes": whole("shard_bytes", shard_bytes),
        "keep_positions": None
        if keep_positions is None
        else whole("keep_positions", keep_positions),
    }
    source, derived_from = as_json("source", source), as_json("derived_from", derived_from)
    provenance, producer = as_json("provenance", provenance), as_json("producer", producer)
    plan = make_plan(
        arrays,
        source=source or {},
        keep_seed=keep_seed,
        compression=compression,
        calibration=calibration,
        derived_from=derived_from,
        **shape,
    )
    present = find_plan(path)
    if present is None:
        layout = plan_layout(num_tokens=len(tokens), compressed=compression != "none", **shape)
        total_bytes = layout.total_bytes
        require_disk(path, total_bytes, "the store", "harvest fewer tokens or layers")
        path.mkdir(parents=True, exist_ok=True)
        if not write_new_durably(path / PLAN, seal(plan.to_json())):
            present = find_plan(path)  # Another process began in the same instant.
        # Whoever may write into a folder may not always look into it.
        with suppress(PermissionError):
            fsync_directory(path.parent)
    if present is not None and present != plan:
        lines = present.differences(plan)
        raise PlanMismatchError(
            f"{path} holds a store of another plan ({'; '.join(lines[:3])}); "
            f"give the settings it was made with, or another directory"
        )
    if not (path / SETUP).exists():
        write_setup(path, plan, arrays, calibration)
    if provenance is not None:
        write_durably(path / PROVENANCE / f"{uuid.uuid4().hex}.json", seal(provenance))
    return Writer(
        path,
        producer=producer,
        allow_mixed=allow_mixed,
        max_added_fvu=max_added_fvu,
        cached=cached,
    )


def resume(
    path: str | os.PathLike[str],
    *,
    producer: Producer | None = None,
    allow_mixed: bool = False,
    max_added_fvu: float = MAX_ADDED_FVU,
    cached: bool = True,
) -> Writer:
    """Continue a store whose tokens are written, by any process.

    Args:
        path: the store's directory.
        producer: argument of `create`.
        allow_mixed: argument of `create`.
        max_added_fvu: argument of `create`.
        cached: argument of `create`.

    Raises:
        NotAStoreError: there is no store, or its tokens are not all written yet.
        MixedProducersError: another producer made some of its shards.
        StoreError: the store is damaged or of another version.
    """
    return Writer(
        Path(path),
        producer=producer,
        allow_mixed=allow_mixed,
        max_added_fvu=max_added_fvu,
        cached=cached,
    )
