"""Making the plan of a new store, or finding the one that a directory holds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlsae.base.directories import is_systems_own
from mlsae.base.errors import InputError
from mlsae.base.files import canonical_json
from mlsae.base.words import SITES
from mlsae.store.errors import NotAStoreError
from mlsae.store.format.calibration import Calibration, check_calibration
from mlsae.store.format.compression import compression_named
from mlsae.store.format.encoding import check_encoding
from mlsae.store.format.layout import plan_layout, token_rows_for
from mlsae.store.places.objects import LocalObjects
from mlsae.store.plan import KeptPositions, Plan, PlannedCalibration
from mlsae.store.read.records import read_plan
from mlsae.store.schema import (
    IGNORED,
    PARTIAL,
    PLAN,
    SCHEMA_VERSION,
)
from mlsae.store.write.tokens import TokenArrays


def make_plan(
    arrays: TokenArrays,
    *,
    context_length: int,
    layers: Sequence[int],
    d_model: int,
    sites: Sequence[str],
    encoding: str,
    batch_sequences: int,
    shard_bytes: int,
    source: Mapping[str, Any],
    keep_positions: int | None = None,
    keep_seed: int = 0,
    compression: str = "none",
    calibration: Calibration | None = None,
    derived_from: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan of a new store, defaults resolved.

    Raises:
        InputError: a value is out of range.
    """
    layers, sites = tuple(int(layer) for layer in layers), tuple(sites)
    if not layers or layers != tuple(sorted(set(layers))) or layers[0] < 0:
        raise InputError(f"layers must be ascending block indices from 0, got {list(layers)}")
    if not sites or len(set(sites)) < len(sites) or not set(sites) <= set(SITES):
        raise InputError(f"sites must be different ones of {', '.join(SITES)}, got {list(sites)}")
    for name, value in {"d_model": d_model, "batch_sequences": batch_sequences}.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    num_tokens = arrays.num_tokens
    layout = plan_layout(
        num_tokens=num_tokens,
        context_length=context_length,
        layers=layers,
        sites=sites,
        d_model=d_model,
        encoding=check_encoding(encoding),
        batch_sequences=batch_sequences,
        shard_bytes=shard_bytes,
        keep_positions=keep_positions,
        compressed=compression != "none",
    )
    check_calibration(calibration, encoding, sites, (len(layers), d_model))
    token_chunk, token_shard = token_rows_for(num_tokens)
    # A plan must equal itself when read back, so tuples and the like take their JSON form here.
    given = json.loads(canonical_json({"source": source, "derived_from": derived_from}))
    return Plan(
        schema_version=SCHEMA_VERSION,
        num_tokens=num_tokens,
        context_length=context_length,
        tokens_sha256=arrays.sha256("tokens"),
        documents_sha256=arrays.sha256("documents"),
        token_flags_sha256=arrays.sha256("token_flags"),
        sites=sites,
        layers=layers,
        d_model=d_model,
        encoding=check_encoding(encoding),
        calibration=None
        if calibration is None
        else PlannedCalibration(num_rows=calibration.num_rows, sha256=calibration.sha256()),
        compression=compression_named(compression),
        batch_sequences=batch_sequences,
        keep_positions=None
        if keep_positions is None
        else KeptPositions(num=int(keep_positions), seed=int(keep_seed)),
        chunk_rows=layout.chunk_rows,
        shard_rows=layout.shard_rows,
        token_chunk=token_chunk,
        token_shard=token_shard,
        **given,
    )


def find_plan(path: Path) -> Plan | None:
    """The plan at `path`, or None where a new store may be made.

    Raises:
        NotAStoreError: the path is a file, or a directory that holds something else.
    """
    if path.exists() and not path.is_dir():
        raise NotAStoreError(f"{path} is a file; give a directory for the store")
    others = [
        entry.name
        for entry in (path.iterdir() if path.exists() else ())
        if entry.name not in IGNORED
        and not entry.name.endswith(PARTIAL)
        and not is_systems_own(entry.name)
    ]
    # Looked for last: who begins a store in this instant writes its plan before all else.
    if (path / PLAN).exists():
        return read_plan(LocalObjects(path))
    if others:
        raise NotAStoreError(
            f"{path} is not empty and holds no store (it has {sorted(others)[0]}); "
            f"give an empty or new directory"
        )
    return None
