"""The plan: everything that decides a store's bytes, fixed before the first shard is written."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mlsae.base.files import canonical_json
from mlsae.base.words import Key
from mlsae.store.format.compression import Compression
from mlsae.store.format.encoding import Encoding, Part, parts_of
from mlsae.store.format.metadata import ArraySpec, zarr_metadata
from mlsae.store.format.positions import kept_positions
from mlsae.store.format.presets import Preset
from mlsae.store.schema import (
    ACTIVATIONS,
    CHANNEL_MEAN,
    CHANNEL_SCALE,
    ROW_TOKEN,
    ROW_TOKEN_DTYPE,
    TOKEN_ARRAYS,
)


@dataclass(frozen=True, kw_only=True)
class KeptPositions:
    """A seeded choice of positions whose activations are stored."""

    num: int
    """Positions kept in each sequence."""
    seed: int
    """Seed for the choice."""


@dataclass(frozen=True, kw_only=True)
class PlannedCalibration:
    """The calibration that an int8 store is to have."""

    num_rows: int
    """Eligible rows that the calibration was made from."""
    sha256: str
    """Hex SHA-256 over the arrays, as `Calibration.sha256` gives it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All settings that decide a store's bytes, and the sizes and names that follow from them.

    `mlsae.store.plancheck.check_plan` makes a plan from JSON that was read, and
    `mlsae.store.write.plan.make_plan` from a producer's settings.
    """

    schema_version: str
    """Version of the specification, MAJOR.MINOR."""
    num_tokens: int
    """Tokens in the text, whole sequences."""
    context_length: int
    """Tokens per sequence."""
    tokens_sha256: str
    """Hex SHA-256 over the token ids, little-endian uint32."""
    documents_sha256: str
    """Hex SHA-256 over the document indices, little-endian uint32."""
    token_flags_sha256: str
    """Hex SHA-256 over the flags, uint8."""
    sites: tuple[str, ...]
    """Places in a block whose activations are stored."""
    layers: tuple[int, ...]
    """Block indices from 0, ascending."""
    d_model: int
    """Channels per activation."""
    encoding: Encoding
    """Form in which activations are held."""
    calibration: PlannedCalibration | None
    """Channel calibration; for int8 alone."""
    compression: Compression | None
    """Compression for activation chunks; None where they lie as they are."""
    batch_sequences: int
    """Sequences that the producer computes at once; shards hold whole batches."""
    keep_positions: KeptPositions | None
    """Positions whose activations are stored; None for all."""
    chunk_rows: int
    """Rows in an activation chunk, the unit of checking."""
    shard_rows: int
    """Rows in an activation shard, the unit of writing and resuming."""
    token_chunk: int
    """Items in a chunk of a token array."""
    token_shard: int
    """Items in a shard of a token array."""
    derived_from: Mapping[str, Any] | None
    """JSON object with the `store_id` from which this store was made, if any."""
    source: Mapping[str, Any]
    """JSON object on the values' origin, as the producer gave it to `create`."""
    extensions: Mapping[str, Any] = field(default_factory=dict)
    """Keys from a later minor version that a reader may pass by; they belong to `id` too."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The plan in a JSON object that keeps to the specification."""
        known = {name: record[name] for name in PLAN_KEYS}
        keep, compression = known["keep_positions"], known["compression"]
        calibration = known["calibration"]
        return cls(
            **known
            | {
                "sites": tuple(known["sites"]),
                "layers": tuple(known["layers"]),
                "keep_positions": None if keep is None else KeptPositions(**keep),
                "compression": None if compression is None else Compression(**compression),
                "calibration": None if calibration is None else PlannedCalibration(**calibration),
            },
            extensions={name: record[name] for name in record.keys() - PLAN_KEYS},
        )

    def to_json(self) -> dict[str, Any]:
        """The plan's JSON object, as it lies in `plan.json`."""
        record = {name: getattr(self, name) for name in PLAN_KEYS}
        for name in ("keep_positions", "compression", "calibration"):
            record[name] = None if record[name] is None else asdict(record[name])
        found: dict[str, Any] = json.loads(canonical_json({**self.extensions, **record}))
        return found

    @cached_property
    def id(self) -> str:
        """Hex SHA-256 of the plan's canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def differences(self, asked: "Plan | Mapping[str, Any]") -> list[str]:
        """`key: ours there, theirs here` for each leaf in which this plan differs, hashes last.

        Args:
            asked: another plan, or some keys from one in their JSON form.
        """
        present = self.to_json()
        if isinstance(asked, Plan):
            lines = _differences(asked.to_json(), present)
        else:
            lines = _differences(asked, {key: present.get(key) for key in asked})
        return sorted(lines, key=lambda line: "sha256" in line or "fingerprint" in line)

    @property
    def num_sequences(self) -> int:
        """Sequences in the text."""
        return self.num_tokens // self.context_length

    @property
    def rows_per_sequence(self) -> int:
        """Rows per sequence."""
        return self.context_length if self.keep_positions is None else self.keep_positions.num

    @property
    def num_rows(self) -> int:
        """Rows in every activation array."""
        return self.num_sequences * self.rows_per_sequence

    @property
    def num_shards(self) -> int:
        """Shards in every activation array."""
        return -(-self.num_rows // self.shard_rows)

    def shard(self, number: int) -> range:
        """Rows in a shard."""
        start = number * self.shard_rows
        return range(start, min(start + self.shard_rows, self.num_rows))

    @property
    def preset(self) -> Preset:
        """Encoding and compression under one name."""
        return Preset(self.encoding, "none" if self.compression is None else self.compression.name)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Arrays that hold a site and layer: one, and for int8 a second."""
        return parts_of(self.encoding, self.d_model)

    @property
    def keys(self) -> tuple[Key, ...]:
        """(site, layer) for all activations, site by site."""
        return tuple((site, layer) for site in self.sites for layer in self.layers)

    @property
    def token_arrays(self) -> tuple[ArraySpec, ...]:
        """Arrays about the text: tokens, documents, flags, and rows' tokens where stored."""
        sizes = {name: (dtype, self.num_tokens) for name, dtype in TOKEN_ARRAYS.items()}
        if self.keep_positions is not None:
            sizes[ROW_TOKEN] = (ROW_TOKEN_DTYPE, self.num_rows)
        return tuple(
            ArraySpec(
                name=name,
                num_rows=num_rows,
                row_shape=(),
                dtype=np.dtype(dtype),
                chunk_rows=self.token_chunk,
                shard_rows=self.token_shard,
                dimensions=("row" if name == ROW_TOKEN else "token",),
            )
            for name, (dtype, num_rows) in sizes.items()
        )

    @property
    def calibration_arrays(self) -> tuple[ArraySpec, ...]:
        """Arrays with channel means and scales, (layers, d_model) for each site; for int8 alone."""
        if self.calibration is None:
            return ()
        return tuple(
            ArraySpec(
                name=f"{name}/{site}",
                num_rows=len(self.layers),
                row_shape=(self.d_model,),
                dtype=np.dtype("<f4"),
                chunk_rows=len(self.layers),
                shard_rows=len(self.layers),
                dimensions=("layer", "channel"),
                attributes={"site": site, "layers": list(self.layers)},
            )
            for site in self.sites
            for name in (CHANNEL_MEAN, CHANNEL_SCALE)
        )

    def activation_arrays(self, site: str, layer: int) -> tuple[ArraySpec, ...]:
        """Arrays that hold a site and layer, in the order of `parts`."""
        return tuple(
            ArraySpec(
                name=part.array(site, layer),
                num_rows=self.num_rows,
                row_shape=(part.width,),
                dtype=part.dtype,
                chunk_rows=self.chunk_rows,
                shard_rows=self.shard_rows,
                dimensions=("row", "channel" if part.folder == ACTIVATIONS else "block"),
                attributes={"site": site, "layer": layer, "encoding": self.encoding},
                compression=self.compression,
            )
            for part in self.parts
        )

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """All arrays in the store."""
        activations = [spec for key in self.keys for spec in self.activation_arrays(*key)]
        return (*self.token_arrays, *self.calibration_arrays, *activations)

    def metadata(self) -> dict[str, bytes]:
        """Path inside the store → bytes of its zarr.json, for every group and array."""
        about = {"schema_version": self.schema_version, "plan_id": self.id}
        return zarr_metadata(self.arrays, about)

    def setup_objects(self) -> list[str]:
        """Names of shards that are written before the first activation."""
        specs = (*self.token_arrays, *self.calibration_arrays)
        return [spec.object(shard) for spec in specs for shard in range(spec.num_shards)]

    def shard_objects(self, number: int) -> list[str]:
        """Names of the objects that hold a shard's activations."""
        return [spec.object(number) for key in self.keys for spec in self.activation_arrays(*key)]

    def row_tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """(stop − start,) index of the token that each row belongs to."""
        if self.keep_positions is None:
            return np.arange(start, stop, dtype=np.int64)
        num, length = self.keep_positions.num, self.context_length
        first, end = start // num, -(-stop // num)
        tokens = kept_positions(self.keep_positions.seed, first, end - first, length, num)
        tokens += np.arange(first, end)[:, None] * length
        return tokens.reshape(-1)[start - first * num : stop - first * num]


PLAN_KEYS = frozenset(entry.name for entry in fields(Plan)) - {"extensions"}
"""Plan keys that every reader understands."""


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            found += [f"{key}.{line}" for line in _differences(mine, other)]
        elif mine != other:
            found.append(f"{key}: {_brief(other)} there, {_brief(mine)} here")
    return found


def _brief(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
