"""Checking a store whole: every hash, checksum, moment and rule of storage_schema.md."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from mlsae.base.files import DamagedFileError, read_sealed, sha256_file
from mlsae.store.commit import num_shards_of, store_id_of
from mlsae.store.encoding import decode
from mlsae.store.errors import DamagedStoreError
from mlsae.store.metadata import zarr_metadata
from mlsae.store.moments import GroupMoments, from_bytes, group_of_rows
from mlsae.store.reader import open_store
from mlsae.store.schema import (
    ALL_FLAGS,
    COMPLETE,
    IGNORED,
    MOMENTS,
    PARTIAL,
    PLAN,
    PROVENANCE,
    SETUP,
    TOKEN_ARRAYS,
    activation_array,
    chunk_key,
    commit_record,
    shard_moments,
)
from mlsae.store.setup import read_setup, token_readers

MOMENTS_TOLERANCE = 1e-5
Moments = dict[str, GroupMoments]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One broken rule."""

    rule: str
    """Number of the rule in storage_schema.md."""
    path: str
    """Object inside the store."""
    message: str
    """What is wrong, in one line."""

    def __str__(self) -> str:
        return f"{self.rule} {self.path}: {self.message}"


def verify(path: str | os.PathLike[str], *, progress: bool = False) -> list[Problem]:
    """Read every byte of a complete store and hold it against its records and the specification.

    Args:
        path: the store's directory.
        progress: show a bar of the activation bytes read.

    Returns:
        What is wrong; empty for a sound store.

    Raises:
        StoreError: the store cannot be opened at all: none there, incomplete, of another version,
            or its plan, setup record, completion record or Zarr metadata is damaged.
    """
    check = _Verification(path, progress)
    with check.bar:
        check.metadata()
        check.tokens()
        for shard in range(num_shards_of(check.plan)):
            check.shard(shard)
        check.whole()
        check.provenance()
        check.unexpected()
    return check.problems


class _Verification:
    def __init__(self, path: str | os.PathLike[str], progress: bool) -> None:
        self.store = store = open_store(path)
        self.path = store.path
        self.plan = store.plan
        self.problems: list[Problem] = []
        self.setup = read_setup(store.path)
        self.objects: dict[str, str] = {}
        self.total = self._no_moments()
        self.expected = {PLAN, SETUP, COMPLETE, MOMENTS, *self.setup["metadata"]}
        row_bytes = store.d_model * store.itemsize * len(store.layers) * len(store.sites)
        self.bar = tqdm(
            total=store.num_rows * row_bytes,
            unit="B",
            unit_scale=True,
            desc="verify",
            disable=not progress,
        )

    def report(self, rule: str, path: str, message: str) -> None:
        self.problems.append(Problem(rule=rule, path=path, message=message))

    def metadata(self) -> None:
        plan = self.plan
        if plan["num_tokens"] % plan["context_length"]:
            self.report("R-TOKEN-2", PLAN, "num_tokens is not a multiple of context_length")
        batch_rows = plan["batch_sequences"] * plan["context_length"]
        if plan["shard_rows"] % plan["chunk_rows"] or plan["shard_rows"] % batch_rows:
            self.report("R-PLAN-5", PLAN, "shard_rows is no multiple of chunk_rows and of a batch")
        expected = zarr_metadata(self.plan, self.store.plan_id)
        recorded = self.setup["metadata"]
        for name in sorted(expected.keys() ^ recorded.keys()):
            self.report("R-META-1", name, "the setup record must name exactly the plan's metadata")
        for name in sorted(expected.keys() & recorded.keys()):
            if json.loads((self.path / name).read_bytes()) != json.loads(expected[name]):
                self.report("R-META-2", name, "differs from what the plan asks for")

    def tokens(self) -> None:
        num_shards = -(-self.plan["num_tokens"] // self.plan["token_shard"])
        keys = {n: [f"{n}/{chunk_key(s, 1)}" for s in range(num_shards)] for n in TOKEN_ARRAYS}
        if not self._objects(
            SETUP, self.setup["objects"], [key for of_array in keys.values() for key in of_array]
        ):
            return
        for name, reader in token_readers(self.path, self.plan).items():
            digest = hashlib.sha256()
            try:
                for start in range(0, self.plan["num_tokens"], self.plan["token_chunk"]):
                    stop = min(start + self.plan["token_chunk"], self.plan["num_tokens"])
                    values = reader.read(start, stop)
                    digest.update(values.data)
                    if name == "token_flags" and values.max() > ALL_FLAGS:
                        self.report("R-TOKEN-3", name, f"tokens {start} to {stop}: unknown bits")
            except DamagedStoreError as error:
                self.report("R-SHARD-3", name, str(error))
                continue
            if digest.hexdigest() != self.plan[f"{name}_sha256"]:
                self.report("R-TOKEN-4", name, "the values differ from the hash in the plan")

    def shard(self, shard: int) -> None:
        name = commit_record(shard)
        keys = [
            f"{activation_array(site, layer)}/{chunk_key(shard, 2)}"
            for site in self.store.sites
            for layer in self.store.layers
        ]
        self.expected |= {name, shard_moments(shard), *keys}
        try:
            record = read_sealed(self.path / name)
        except FileNotFoundError:
            self.report("R-COMMIT-1", name, "is missing")
            return
        except DamagedFileError as error:
            self.report("R-SEAL-1", name, str(error))
            return
        if record.get("plan_id") != self.store.plan_id or record.get("shard") != shard:
            self.report("R-COMMIT-2", name, "belongs to another plan or shard")
            return
        moments = self._moments_object(shard_moments(shard), record["moments_sha256"])
        if not self._objects(name, record["objects"], keys):
            return
        recomputed = self._recompute(shard)
        if recomputed is not None and moments is not None:
            self._compare(recomputed, moments, shard_moments(shard))
            for site, of_site in moments.items():
                self.total[site].merge(of_site)

    def whole(self) -> None:
        record = read_sealed(self.path / COMPLETE)
        if record["store_id"] != store_id_of(self.store.plan_id, self.objects):
            self.report("R-COMPLETE-2", COMPLETE, "store_id is not that of the recorded objects")
        if record["num_shards"] != num_shards_of(self.plan):
            self.report("R-COMPLETE-3", COMPLETE, f"num_shards must be {num_shards_of(self.plan)}")
        moments = self._moments_object(MOMENTS, record["moments_sha256"])
        if moments is not None and not self.problems:
            self._compare(self.total, moments, MOMENTS)

    def provenance(self) -> None:
        for file in sorted((self.path / PROVENANCE).glob("*.json")):
            self.expected.add(str(file.relative_to(self.path)))
            try:
                read_sealed(file)
            except DamagedFileError as error:
                self.report("R-SEAL-1", str(file.relative_to(self.path)), str(error))

    def unexpected(self) -> None:
        for file in sorted(self.path.rglob("*")):
            name = str(file.relative_to(self.path))
            if file.is_file() and name not in self.expected | IGNORED:
                what = "was left by a harvest that was killed; delete it"
                self.report(
                    "R-LAYOUT-3", name, what if name.endswith(PARTIAL) else "does not belong here"
                )

    def _objects(self, record: str, objects: Mapping[str, str], keys: list[str]) -> bool:
        """Whether a record names exactly these objects and each has its recorded hash."""
        self.expected |= set(keys)
        self.objects.update(objects)
        if set(objects) != set(keys):
            wrong = sorted(set(objects) ^ set(keys))
            self.report("R-COMMIT-3", record, f"must name every object and no other: {wrong[:3]}")
            return False
        num_problems = len(self.problems)
        for key in keys:
            file = self.path / key
            if not file.exists():
                self.report("R-COMMIT-4", key, "is missing")
            elif sha256_file(file) != objects[key]:
                self.report("R-COMMIT-4", key, f"its SHA-256 is not {objects[key][:16]}…")
        return len(self.problems) == num_problems

    def _moments_object(self, name: str, digest: str) -> Moments | None:
        file = self.path / name
        data = file.read_bytes() if file.exists() else b""
        if hashlib.sha256(data).hexdigest() != digest:
            self.report("R-MOMENT-2", name, "is missing, or its SHA-256 is not the recorded one")
            return None
        try:
            return from_bytes(data, self.store.sites, self.store.layers, self.store.d_model)
        except (KeyError, ValueError) as error:
            self.report("R-MOMENT-1", name, f"does not hold this store's moments: {error}")
            return None

    def _no_moments(self) -> Moments:
        width = self.store.d_model
        return {site: GroupMoments(self.store.layers, width) for site in self.store.sites}

    def _recompute(self, shard: int) -> Moments | None:
        """The moments of a shard's decoded values; None (and a report) where a chunk is damaged."""
        store, moments = self.store, self._no_moments()
        stop = min((shard + 1) * store.shard_rows, store.num_rows)
        for start in range(shard * store.shard_rows, stop, store.chunk_rows):
            end = min(start + store.chunk_rows, stop)
            group = group_of_rows(store.token_flags(start, end), store.positions(start, end))
            for site in store.sites:
                block, above = moments[site].block(group), None
                for index in reversed(range(len(store.layers))):
                    reader = store.reader(site, store.layers[index])
                    try:
                        stored = reader.check_chunk(start // store.chunk_rows)
                    except DamagedStoreError as error:
                        self.report("R-SHARD-3", activation_array(site, index), str(error))
                        return None
                    values = decode(stored[: end - start].copy(), store.encoding)
                    if stored[end - start :].any():
                        self.report("R-SHARD-4", activation_array(site, index), "padding is not 0")
                    if not np.isfinite(values).all():
                        self.report(
                            "R-ACT-3",
                            activation_array(site, store.layers[index]),
                            f"rows {start} to {end} hold a value that is not finite",
                        )
                        return None
                    block.add_layer(index, values, above)
                    above = values
                    self.bar.update(values.size * store.itemsize)
                moments[site].merge(block)
        return moments

    def _compare(self, computed: Moments, found: Moments, name: str) -> None:
        for site, mine in computed.items():
            theirs = found[site].tensors()
            for key, expected in mine.tensors().items():
                scale = np.abs(expected).max(initial=0.0)
                if key.endswith("mean"):
                    scale += np.sqrt(np.abs(mine.per_channel["m2"]).max(initial=0.0))
                elif key == "adjacent_cross":
                    scale += mine.per_channel["m2"].sum(axis=-1).max(initial=0.0)
                if not np.allclose(
                    theirs[key], expected, rtol=MOMENTS_TOLERANCE, atol=1e-9 * scale
                ):
                    self.report(
                        "R-MOMENT-3", name, f"{site}/{key} is not that of the decoded values"
                    )
