"""Checking a store whole: every hash, checksum, moment and rule of storage_schema.md."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.directories import is_systems_own
from mlsae.base.output.console import Progress
from mlsae.store.errors import DamagedStoreError, RemoteError, StoreError
from mlsae.store.format.accumulate import Accumulator
from mlsae.store.format.encoding import MAX_QUANTUM, Stored
from mlsae.store.format.moments import GroupMoments, from_bytes, moments_bytes
from mlsae.store.read.arrays import ArrayReader
from mlsae.store.read.commits import store_id_of
from mlsae.store.read.records import read_commit, read_complete, read_sealed_object, read_setup
from mlsae.store.read.setup import token_readers
from mlsae.store.read.store import Store, open_store
from mlsae.store.schema import (
    ACTIVATIONS,
    ALL_FLAGS,
    ARRAY_METADATA,
    BLOCK_EXPONENTS,
    CARD,
    CHANNEL_MEAN,
    CHANNEL_SCALE,
    COMPLETE,
    IGNORED,
    MOMENTS,
    PARTIAL,
    PLAN,
    PROVENANCE,
    ROW_TOKEN,
    SETUP,
    TOKEN_ARRAYS,
    chunk_key,
    commit_record,
    shard_moments,
)
from mlsae.store.write.card import MAX_CARD_BYTES, card_problem

MOMENTS_TOLERANCE = 1e-5
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One broken rule."""

    rule: str
    """Number of the rule in storage_schema.md."""
    path: str
    """Object inside the store."""
    message: str
    """Description of the fault, in one line."""

    def __str__(self) -> str:
        return f"{self.rule} {self.path}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Findings of a verification."""

    problems: list[Problem] = field(default_factory=list)
    """Broken rules; empty for a sound store."""
    notes: list[str] = field(default_factory=list)
    """Parts that could not be checked."""


def verify(
    location: str | os.PathLike[str],
    *,
    progress: bool = False,
    cache_dir: Path | None = None,
    cache_bytes: int | None = None,
) -> Report:
    """Read every byte of a complete store and hold it against its records and the specification.

    Args:
        location: the store's directory or URL.
        progress: show the activation bytes read, as a bar or lines.
        cache_dir: argument of `open_store`.
        cache_bytes: argument of `open_store`.

    Returns:
        Faults of the store. A fault of the plan, a record or the Zarr metadata stands alone:
        nothing else can be read then.

    Raises:
        NotAStoreError: there is no store.
        RemoteError: the place cannot be reached.
    """
    try:
        store = open_store(location, cache_dir=cache_dir, cache_bytes=cache_bytes)
    except StoreError as error:
        if error.rule is None:
            raise
        return Report(problems=[Problem(rule=error.rule, path="", message=str(error))])
    check = _Verification(store, progress)
    with check.progress:
        check.metadata()
        check.tokens()
        check.calibration()
        # Moments follow from rows and calibration: where those are wrong, they say nothing more.
        check.has_sound_rows = not check.problems
        for shard in range(check.plan.num_shards):
            check.shard(shard)
        check.whole()
        check.others()
    return Report(problems=check.problems, notes=check.notes)


class _Verification:
    def __init__(self, store: Store, progress: bool) -> None:
        self.store = store
        self.plan = store.plan
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.has_sound_rows = True
        self.setup = read_setup(store.objects, store.plan_id)
        self.objects: dict[str, str] = {}
        self.total: dict[str, GroupMoments] = {}
        self.expected = {PLAN, SETUP, COMPLETE, MOMENTS, *self.setup.metadata}
        row_bytes = store.row_bytes * len(store.layers) * len(store.sites)
        self.progress = Progress("verify", store.num_rows * row_bytes, "B", shown=progress)

    def report(self, rule: str, path: str, message: str) -> None:
        self.problems.append(Problem(rule=rule, path=path, message=message))

    def metadata(self) -> None:
        for name, expected in self.plan.metadata().items():
            if name == ARRAY_METADATA and self.store.is_consolidated:
                self.notes.append(f"{name} holds consolidated_metadata too, which a tool added")
                continue
            try:
                theirs = json.loads(self.store.objects.read(name, len(expected) * 4 + 2**16))
            except (ValueError, RecursionError, DamagedStoreError):
                theirs = None
            if rule := _broken_metadata(name, theirs, json.loads(expected)):
                self.report(rule, name, "differs from what the plan asks for")

    def tokens(self) -> None:
        if not self._have_hashes(SETUP, self.setup.objects):
            return
        planned = {
            "tokens": self.plan.tokens_sha256,
            "documents": self.plan.documents_sha256,
            "token_flags": self.plan.token_flags_sha256,
        }
        for name, reader in token_readers(self.store.objects, self.plan).items():
            digest = hashlib.sha256()
            try:
                for start in range(0, reader.num_rows, reader.chunk_rows):
                    stop = min(start + reader.chunk_rows, reader.num_rows)
                    values = reader.read(start, stop)
                    digest.update(values.data)
                    if name == "token_flags" and values.max() > ALL_FLAGS:
                        self.report("R-TOKEN-3", name, f"tokens {start} to {stop}: unknown bits")
                    if name == ROW_TOKEN and not np.array_equal(
                        values, self.plan.row_tokens(start, stop)
                    ):
                        self.report("R-ROW-3", name, f"rows {start} to {stop} are not the plan's")
            except DamagedStoreError as error:
                self._report(error, name)
                continue
            if name in planned and digest.hexdigest() != planned[name]:
                self.report("R-TOKEN-4", name, "the values differ from the hash in the plan")

    def calibration(self) -> None:
        calibration, planned = self.store.calibration, self.plan.calibration
        if calibration is None or planned is None:
            return
        if calibration.sha256() != planned.sha256:
            self.report("R-INT8-2", PLAN, "the calibration's hash is not that of its arrays")
        for site, of_site in calibration.sites.items():
            if not np.isfinite(of_site.mean).all():
                self.report("R-INT8-3", f"channel_mean/{site}", "a mean is not finite")
            if not (np.isfinite(of_site.scale) & (of_site.scale > 0)).all():
                self.report(
                    "R-INT8-3", f"channel_scale/{site}", "a scale is not above 0 and finite"
                )

    def shard(self, shard: int) -> None:
        name = commit_record(shard)
        keys = self.plan.shard_objects(shard)
        self.expected |= {name, shard_moments(shard), *keys}
        try:
            record = read_commit(self.store.objects, self.store.plan_id, shard)
        except FileNotFoundError:
            self.report("R-COMMIT-1", name, "is missing")
            return
        except StoreError as error:
            self._report(error, name)
            return
        moments = self._moments_object(shard_moments(shard), record.moments_sha256)
        if set(record.objects) != set(keys):
            wrong = sorted(set(record.objects) ^ set(keys))
            self.report("R-COMMIT-3", name, f"must name every object and no other: {wrong[:3]}")
            return
        self.objects.update(record.objects)
        if moments is None:
            self._have_hashes(name, record.objects)
            return
        num_problems = len(self.problems)
        digests = {key: hashlib.sha256() for key in keys}
        recomputed = self._recompute(shard, digests)
        found = {key: digest.hexdigest() for key, digest in digests.items()}
        if recomputed is None or found != record.objects:
            # Some objects were not read to their ends; each is looked at by itself now.
            self._have_hashes(name, record.objects)
        elif len(self.problems) == num_problems:
            if self.has_sound_rows:
                self._compare(recomputed, moments, shard_moments(shard))
            for site, of_site in moments.items():
                if site not in self.total:
                    self.total[site] = GroupMoments(self.store.layers, self.store.d_model)
                self.total[site].merge(of_site)

    def whole(self) -> None:
        record = read_complete(self.store.objects, self.store.plan_id)
        if record.num_shards != self.plan.num_shards:
            self.report("R-COMPLETE-3", COMPLETE, f"num_shards must be {self.plan.num_shards}")
        moments = self._moments_object(MOMENTS, record.moments_sha256)
        if self.problems:
            return
        if record.store_id != store_id_of(self.store.plan_id, self.objects):
            self.report("R-COMPLETE-2", COMPLETE, "store_id is not that of the recorded objects")
        if moments is not None:
            self._compare(self.total, moments, MOMENTS)

    def others(self) -> None:
        """Check the card, provenance, and objects that do not belong to a store."""
        self._card()
        try:
            names = sorted(name for name, _ in self.store.objects.walk())
        except RemoteError as error:
            self.notes.append(f"provenance and objects that do not belong were not seen: {error}")
            return
        for name in names:
            if name.startswith(f"{PROVENANCE}/") and name.endswith(".json"):
                try:
                    read_sealed_object(self.store.objects, name)
                except DamagedStoreError as error:
                    self._report(error, name)
            elif name.endswith(PARTIAL):
                self.report("R-LAYOUT-3", name, "was left by a process that was killed; delete it")
            elif name not in self.expected | IGNORED and not _is_systems_own(name):
                self.report("R-LAYOUT-3", name, "does not belong here")

    def _card(self) -> None:
        # One that is missing, or longer than any card, is the owner's own affair.
        with suppress(FileNotFoundError, DamagedStoreError):
            problem = card_problem(self.store.objects.read(CARD, MAX_CARD_BYTES))
            if problem is not None:
                self.report("R-CARD-1", CARD, problem)

    def _report(self, error: StoreError, name: str) -> None:
        self.report(error.rule or "R-SHARD-3", name, str(error))

    def _have_hashes(self, record: str, objects: Mapping[str, str]) -> bool:
        """True if each object is there with the hash that a record names."""
        self.expected |= set(objects)
        self.objects.update(objects)
        num_problems = len(self.problems)
        for key, digest in objects.items():
            try:
                if self._sha256(key) != digest:
                    self.report("R-COMMIT-4", key, f"the SHA-256 is not {digest[:16]}…")
            except FileNotFoundError:
                self.report("R-COMMIT-4", key, f"is missing; {record} names it")
            except DamagedStoreError as error:
                self._report(error, key)
        return len(self.problems) == num_problems

    def _sha256(self, name: str) -> str:
        digest, offset = hashlib.sha256(), 0
        block = np.empty(2**20, np.uint8)
        count = len(block)
        while count == len(block):
            count = self.store.objects.read_into(name, offset, block)
            digest.update(block[:count].data)
            offset += count
        return digest.hexdigest()

    def _moments_object(self, name: str, digest: str) -> Mapping[str, GroupMoments] | None:
        store = self.store
        limit = moments_bytes(len(store.layers), len(store.sites), store.d_model) + 2**20
        try:
            data = store.objects.read(name, limit)
        except (FileNotFoundError, DamagedStoreError):
            data = b""
        if hashlib.sha256(data).hexdigest() != digest:
            self.report("R-MOMENT-2", name, "is missing, or its SHA-256 is not the recorded one")
            return None
        try:
            return from_bytes(data, self.store.sites, self.store.layers, self.store.d_model)
        except (KeyError, ValueError) as error:
            self.report("R-MOMENT-1", name, f"does not hold this store's moments: {error}")
            return None

    def _recompute(
        self, shard: int, digests: Mapping[str, "hashlib._Hash"]
    ) -> Mapping[str, GroupMoments] | None:
        """The moments of a shard's decoded values; None (and a report) where a chunk is damaged.

        Every byte of the shard's objects goes to their digests.
        """
        store = self.store
        codecs = store.codecs
        moments = {
            site: Accumulator(store.layers, store.d_model, codecs[site]) for site in store.sites
        }
        rows = store.plan.shard(shard)
        readers = {
            site: [store.reader(site, layer) for layer in store.layers] for site in store.sites
        }
        for start in rows[:: store.chunk_rows]:
            end = min(start + store.chunk_rows, rows.stop)
            try:
                groups = store.row_groups(start, end)
            except StoreError:
                return None  # Reported with the tokens.
            for site in store.sites:
                stored = []
                for layer, reader in zip(store.layers, readers[site], strict=True):
                    parts = []
                    for part, array in zip(store.parts, reader.arrays, strict=True):
                        name = part.array(site, layer)
                        digest = digests[f"{name}/{chunk_key(shard, 2)}"]
                        chunk = self._chunk(array, name, start, end, digest)
                        if chunk is None:
                            return None
                        parts.append(chunk)
                    stored.append(tuple(parts))
                if not moments[site].add(groups, stored):
                    self._report_not_finite(site, start, end, stored)
                    return None
        for site in store.sites:
            for layer, reader in zip(store.layers, readers[site], strict=True):
                for part, array in zip(store.parts, reader.arrays, strict=True):
                    key = f"{part.array(site, layer)}/{chunk_key(shard, 2)}"
                    array.check_index(shard, digests[key])
        return {**moments}

    def _chunk(
        self, array: ArrayReader, name: str, start: int, end: int, digest: "hashlib._Hash"
    ) -> Array | None:
        """Rows start … end − 1 of a whole chunk; None (and a report) where it is damaged."""
        try:
            chunk = array.check_chunk(start // self.store.chunk_rows, digest)
        except DamagedStoreError as error:
            self._report(error, name)
            return None
        if chunk[end - start :].any():
            self.report("R-SHARD-4", name, "padding is not 0")
        rows = chunk[: end - start].copy()
        is_quanta = self.store.encoding == "int8" and name.startswith(f"{ACTIVATIONS}/")
        if is_quanta and (rows < -MAX_QUANTUM).any():
            self.report("R-INT8-4", name, f"rows {start} to {end} hold a quantum of -128")
        self.progress.update(rows.nbytes)
        return rows

    def _report_not_finite(self, site: str, start: int, end: int, stored: list[Stored]) -> None:
        for layer, parts in zip(self.store.layers, stored, strict=True):
            if not np.isfinite(self.store.decode(parts, site, layer)).all():
                self.report(
                    "R-ACT-3",
                    f"activations/{site}/{layer}",
                    f"rows {start} to {end} hold a value that is not finite",
                )

    def _compare(
        self, computed: Mapping[str, GroupMoments], found: Mapping[str, GroupMoments], name: str
    ) -> None:
        """Hold moments against recomputed ones, as R-MOMENT-3 says."""
        for site, mine in computed.items():
            theirs, scales = found[site].tensors(), _scales(mine)
            for key, expected in mine.tensors().items():
                if (np.abs(theirs[key] - expected) > MOMENTS_TOLERANCE * scales[key]).any():
                    self.report(
                        "R-MOMENT-3", name, f"{site}/{key} is not that of the decoded values"
                    )


def _broken_metadata(name: str, found: object, expected: Mapping[str, Any]) -> str | None:
    """The rule that a zarr.json breaks, if any."""
    if found == expected:
        return None
    if name == ARRAY_METADATA:
        return "R-LAYOUT-1"
    if not isinstance(found, Mapping):
        return "R-META-2"
    folder = name.split("/")[0]
    if folder in (CHANNEL_MEAN, CHANNEL_SCALE):
        return "R-INT8-2"
    if folder == BLOCK_EXPONENTS:
        return "R-INT8-5"
    if any(found.get(key) != expected.get(key) for key in ("shape", "data_type")):
        return "R-TOKEN-1" if folder in (*TOKEN_ARRAYS, ROW_TOKEN) else "R-ACT-1"
    if found.get("codecs") != expected.get("codecs"):
        return "R-LAYOUT-2"
    return "R-ACT-2" if found.get("attributes") != expected.get("attributes") else "R-META-2"


def _is_systems_own(name: str) -> bool:
    return any(is_systems_own(part) for part in name.split("/"))


def _scales(moments: GroupMoments) -> dict[str, Array]:
    """Tensor → scale of its errors: see R-MOMENT-3."""
    count_G1 = np.maximum(moments.count_G, 1)[:, None]
    square_2LGD = moments.mean_2LGD**2 + moments.m2_2LGD / count_G1
    square_2LGD += square_2LGD.mean(axis=-1, keepdims=True)
    sum_2LGD = count_G1 * square_2LGD
    m2_2LGD = moments.m2_2LGD + 0.1 * np.sqrt(moments.m2_2LGD * sum_2LGD) + 1e-7 * sum_2LGD
    total_LG = m2_2LGD[0].sum(axis=-1)
    return {
        "count": np.zeros(len(count_G1)),
        "mean": np.sqrt(square_2LGD[0]),
        "u_mean": np.sqrt(square_2LGD[1]),
        "m2": m2_2LGD[0],
        "u_m2": m2_2LGD[1],
        "norm_sum": moments.norm_sum_LG,
        "max_abs": moments.max_abs_LG,
        "adjacent_cross": np.sqrt(total_LG[:-1] * total_LG[1:]),
    }
