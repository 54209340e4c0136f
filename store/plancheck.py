"""A plan that was read is held against the specification before anything in it is believed.

A store may come from anybody, so sizes are checked before memory is taken by them and names before
they become paths.
"""

import re
from collections.abc import Mapping
from typing import Any

from mlsae.base.words import SITES
from mlsae.store.errors import InvalidStoreError, SchemaVersionError
from mlsae.store.format.compression import COMPRESSIONS
from mlsae.store.format.encoding import STORED_DTYPE
from mlsae.store.format.layout import MAX_OBJECT_BYTES, MAX_SHARDS, object_bytes
from mlsae.store.format.moments import moments_bytes
from mlsae.store.format.positions import MAX_KEPT_CONTEXT
from mlsae.store.plan import PLAN_KEYS, Plan
from mlsae.store.schema import PLAN, SCHEMA_VERSION

MAX_COUNT = 2**62
MAX_WIDTH = 2**24
MAX_LAYERS = 999
"""With the site's metadata a folder holds at most 1,000 objects."""
MAX_LEVEL = 9
MAX_CHUNK_BYTES = 2**28
MAX_CHUNKS = 2**22
"""Most chunks of a shard: their index takes 64 MiB then."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_version(version: object, place: str) -> None:
    """Refuse a store that this package may misread.

    Raises:
        SchemaVersionError: not MAJOR.MINOR, or another MAJOR.
    """
    match = re.fullmatch(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    if match is None:
        raise SchemaVersionError(
            f"{place}: schema_version must be MAJOR.MINOR such as {SCHEMA_VERSION}, "
            f"got {version!r}",
            rule="R-VERSION-1",
        )
    ours = int(SCHEMA_VERSION.split(".")[0])
    if int(match[1]) == ours:
        return
    raise SchemaVersionError(
        f"{place}: the store follows schema {version}, this mlsae reads {SCHEMA_VERSION}; "
        + ("upgrade mlsae" if int(match[1]) > ours else "read it with the mlsae that wrote it"),
        rule="R-VERSION-2",
    )


def is_ignorable(value: object) -> bool:
    """True for a value that a reader who does not know it may pass by."""
    return isinstance(value, Mapping) and value.get("must_understand") is False


def check_keys(record: Mapping[str, Any], known: frozenset[str], where: str, rule: str) -> None:
    """Refuse keys that are missing, or unknown and not marked as ignorable.

    Raises:
        InvalidStoreError: naming them.
    """
    unknown = sorted(key for key in record.keys() - known if not is_ignorable(record[key]))
    if unknown:
        raise InvalidStoreError(
            f"{where} has unknown keys {', '.join(unknown[:5])}; a newer mlsae may know them",
            rule=rule,
        )
    if missing := sorted(known - record.keys()):
        raise InvalidStoreError(f"{where} lacks {', '.join(missing)}", rule=rule)


def is_sha256(value: object) -> bool:
    """True for a hexadecimal SHA-256 in lower case."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def check_plan(record: Mapping[str, Any], place: str) -> Plan:
    """Make a plan of a JSON object that was read from a store.

    Args:
        record: content of `plan.json`, its seal taken off.
        place: directory or URL of the store, for messages.

    Raises:
        SchemaVersionError: the plan is of a version that this package cannot read.
        InvalidStoreError: the plan breaks a rule of the specification, which the error names.
    """
    check_version(record.get("schema_version"), place)
    check_keys(record, PLAN_KEYS, f"{place}: {PLAN}", "R-PLAN-1")
    check = _PlanCheck(record, place)
    check.numbers()
    check.lists()
    check.hashes()
    check.encoding()
    check.objects()
    plan = Plan.from_json(record)
    check.sizes(plan)
    return plan


class _PlanCheck:
    def __init__(self, record: Mapping[str, Any], place: str) -> None:
        self._record = record
        self._place = place

    def numbers(self) -> None:
        self._integer("context_length", 1, MAX_COUNT)
        self._integer("num_tokens", 1, MAX_COUNT)
        self._integer("d_model", 1, MAX_WIDTH)
        for key in ("batch_sequences", "chunk_rows", "shard_rows", "token_chunk", "token_shard"):
            self._integer(key, 1, MAX_COUNT)
        if self._record["num_tokens"] % self._record["context_length"]:
            raise self._wrong("num_tokens", "whole sequences of context_length", "R-TOKEN-2")

    def lists(self) -> None:
        layers, sites = self._record["layers"], self._record["sites"]
        if isinstance(layers, list) and len(layers) > MAX_LAYERS:
            raise self._wrong("layers", f"at most {MAX_LAYERS}", "R-PLAN-7")
        if (
            not isinstance(layers, list)
            or not layers
            or not all(type(layer) is int and 0 <= layer < MAX_COUNT for layer in layers)
            or layers != sorted(set(layers))
        ):
            raise self._wrong("layers", "block indices, ascending", "R-PLAN-4")
        if (
            not isinstance(sites, list)
            or not sites
            or not all(isinstance(site, str) and site in SITES for site in sites)
            or len(set(sites)) < len(sites)
        ):
            raise self._wrong("sites", f"different ones of {', '.join(SITES)}", "R-PLAN-4")

    def hashes(self) -> None:
        for key in ("tokens_sha256", "documents_sha256", "token_flags_sha256"):
            if not is_sha256(self._record[key]):
                raise self._wrong(key, "64 hexadecimal digits", "R-PLAN-4")

    def encoding(self) -> None:
        encoding, compression = self._record["encoding"], self._record["compression"]
        if not isinstance(encoding, str) or encoding not in STORED_DTYPE:
            raise self._wrong("encoding", f"one of {', '.join(STORED_DTYPE)}", "R-PLAN-4")
        if compression is not None and (
            not isinstance(compression, dict)
            or compression.keys() != {"name", "level"}
            or compression["name"] not in COMPRESSIONS[1:]
            or type(compression["level"]) is not int
            or not 1 <= compression["level"] <= MAX_LEVEL
        ):
            raise self._wrong(
                "compression",
                f'null or {{"name": "zstd", "level": 1 to {MAX_LEVEL}}}',
                "R-PLAN-4",
            )
        calibration = self._record["calibration"]
        if encoding != "int8":
            if calibration is not None:
                raise self._wrong("calibration", f"null for {encoding}", "R-INT8-1")
        elif (
            not isinstance(calibration, dict)
            or calibration.keys() != {"num_rows", "sha256"}
            or type(calibration["num_rows"]) is not int
            or calibration["num_rows"] < 1
            or not is_sha256(calibration["sha256"])
        ):
            raise self._wrong("calibration", "num_rows and sha256 for int8", "R-INT8-1")

    def objects(self) -> None:
        keep, derived = self._record["keep_positions"], self._record["derived_from"]
        length = self._record["context_length"]
        if keep is not None and (
            not isinstance(keep, dict)
            or keep.keys() != {"num", "seed"}
            or type(keep["num"]) is not int
            or type(keep["seed"]) is not int
            or not 1 <= keep["num"] <= length
        ):
            raise self._wrong(
                "keep_positions", f"null, or num from 1 to {length} and a seed", "R-ROW-1"
            )
        if keep is not None and length > MAX_KEPT_CONTEXT:
            raise self._wrong(
                "context_length", f"at most {MAX_KEPT_CONTEXT} with keep_positions", "R-ROW-1"
            )
        if not isinstance(self._record["source"], dict):
            raise self._wrong("source", "an object", "R-PLAN-4")
        if derived is not None and (
            not isinstance(derived, dict) or not is_sha256(derived.get("store_id"))
        ):
            raise self._wrong("derived_from", "null, or an object with a store_id", "R-PLAN-6")

    def sizes(self, plan: Plan) -> None:
        batch_rows = plan.batch_sequences * plan.rows_per_sequence
        if plan.shard_rows % plan.chunk_rows or plan.shard_rows % batch_rows:
            raise self._wrong("shard_rows", "whole chunks and whole batches", "R-PLAN-5")
        if plan.token_shard % plan.token_chunk:
            raise self._wrong("token_shard", "whole chunks", "R-PLAN-5")
        row_bytes = max(part.row_bytes for part in plan.parts)
        token_bytes = 4 if plan.keep_positions is None else 8
        self._arrays(
            ("shard_rows", "chunk_rows"), plan.num_rows, row_bytes, plan.shard_rows, plan.chunk_rows
        )
        self._arrays(
            ("token_shard", "token_chunk"),
            plan.num_tokens,
            token_bytes,
            plan.token_shard,
            plan.token_chunk,
        )
        if moments_bytes(len(plan.layers), len(plan.sites), plan.d_model) > MAX_OBJECT_BYTES:
            raise self._wrong(
                "d_model", f"so that moments take at most {MAX_OBJECT_BYTES} bytes", "R-PLAN-7"
            )

    def _arrays(
        self, keys: tuple[str, str], num_rows: int, row_bytes: int, shard_rows: int, chunk_rows: int
    ) -> None:
        """Refuse arrays that are cut into too many or too large pieces."""
        shard_key, chunk_key = keys
        if -(-num_rows // shard_rows) > MAX_SHARDS:
            expected = f"so that there are at most {MAX_SHARDS} shards"
            raise self._wrong(shard_key, expected, "R-PLAN-7")
        if chunk_rows * row_bytes > MAX_CHUNK_BYTES:
            expected = f"so that a chunk is at most {MAX_CHUNK_BYTES} bytes"
            raise self._wrong(chunk_key, expected, "R-PLAN-7")
        if shard_rows // chunk_rows > MAX_CHUNKS:
            raise self._wrong(shard_key, f"at most {MAX_CHUNKS} chunks", "R-PLAN-7")
        size = object_bytes(min(num_rows, shard_rows), row_bytes, chunk_rows, shard_rows)
        if size > MAX_OBJECT_BYTES:
            expected = f"so that an object is at most {MAX_OBJECT_BYTES} bytes"
            raise self._wrong(shard_key, expected, "R-PLAN-7")

    def _integer(self, key: str, low: int, high: int) -> None:
        value = self._record[key]
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, f"an integer from {low} to {high}", "R-PLAN-4")

    def _wrong(self, key: str, expected: str, rule: str) -> InvalidStoreError:
        got = str(self._record[key])
        return InvalidStoreError(
            f"{self._place}: {PLAN}: {key} must be {expected}, got "
            f"{got if len(got) <= 60 else got[:57] + '…'}",
            rule=rule,
        )
