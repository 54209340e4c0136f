"""Checking a store whole: every hash, checksum, moment and rule of storage_schema.md."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from mlsae.base.files import DamagedFileError, read_sealed, sha256_file
from mlsae.store.accumulate import Accumulator, blocks_of
from mlsae.store.commit import num_shards_of, store_id_of
from mlsae.store.errors import DamagedStoreError
from mlsae.store.metadata import zarr_metadata
from mlsae.store.moments import GroupMoments, from_bytes
from mlsae.store.reader import open_store
from mlsae.store.rows import planned_row_tokens, rows_per_sequence_of, setup_arrays
from mlsae.store.schema import (
    ALL_FLAGS,
    COMPLETE,
    IGNORED,
    MOMENTS,
    PARTIAL,
    PLAN,
    PROVENANCE,
    ROW_TOKEN,
    SETUP,
    activation_array,
    chunk_key,
    commit_record,
    shard_moments,
)
from mlsae.store.setup import read_setup, setup_readers

MOMENTS_TOLERANCE = 1e-5
Moments = Mapping[str, GroupMoments]
Array = npt.NDArray[Any]


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
        batch_rows = plan["batch_sequences"] * rows_per_sequence_of(plan)
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
        keys = []
        for name, (_, length) in setup_arrays(self.plan).items():
            num_shards = -(-length // self.plan["token_shard"])
            keys += [f"{name}/{chunk_key(shard, 1)}" for shard in range(num_shards)]
        if not self._objects(SETUP, self.setup["objects"], keys):
            return
        for name, reader in setup_readers(self.path, self.plan).items():
            digest = hashlib.sha256()
            try:
                for start in range(0, reader.num_rows, self.plan["token_chunk"]):
                    stop = min(start + self.plan["token_chunk"], reader.num_rows)
                    values = reader.read(start, stop)
                    digest.update(values.data)
                    if name == "token_flags" and values.max() > ALL_FLAGS:
                        self.report("R-TOKEN-3", name, f"tokens {start} to {stop}: unknown bits")
                    if name == ROW_TOKEN and not np.array_equal(
                        values, planned_row_tokens(self.plan, start, stop)
                    ):
                        self.report("R-ROW-3", name, f"rows {start} to {stop} are not the plan's")
            except DamagedStoreError as error:
                self.report("R-SHARD-3", name, str(error))
                continue
            if name != ROW_TOKEN and digest.hexdigest() != self.plan[f"{name}_sha256"]:
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
        store = self.store
        moments = {
            site: Accumulator(store.layers, store.d_model, store.encoding) for site in store.sites
        }
        stop = min((shard + 1) * store.shard_rows, store.num_rows)
        for start in range(shard * store.shard_rows, stop, store.chunk_rows):
            end = min(start + store.chunk_rows, stop)
            blocks = blocks_of(store.row_groups(start, end), store.d_model)
            for site in store.sites:
                stored = self._chunks(site, start, end)
                if stored is None:
                    return None
                if not moments[site].add(blocks, stored):
                    self._report_not_finite(site, start, end, stored)
                    return None
        return {**moments}

    def _chunks(self, site: str, start: int, end: int) -> list[Array] | None:
        """Rows start … end − 1 of every layer, a whole chunk; None (and a report) where damaged."""
        store, stored = self.store, []
        for layer in store.layers:
            try:
                chunk = store.reader(site, layer).check_chunk(start // store.chunk_rows)
            except DamagedStoreError as error:
                self.report("R-SHARD-3", activation_array(site, layer), str(error))
                return None
            if chunk[end - start :].any():
                self.report("R-SHARD-4", activation_array(site, layer), "padding is not 0")
            stored.append(chunk[: end - start].copy())
            self.bar.update(stored[-1].nbytes)
        return stored

    def _report_not_finite(self, site: str, start: int, end: int, stored: list[Array]) -> None:
        for layer, values in zip(self.store.layers, stored, strict=True):
            if not np.isfinite(self.store.decode(values)).all():
                self.report(
                    "R-ACT-3",
                    activation_array(site, layer),
                    f"rows {start} to {end} hold a value that is not finite",
                )

    def _compare(self, computed: Moments, found: Moments, name: str) -> None:
        """Hold moments against recomputed ones, as R-MOMENT-3 says."""
        for site, mine in computed.items():
            theirs, scales = found[site].tensors(), _scales(mine)
            for key, expected in mine.tensors().items():
                if (np.abs(theirs[key] - expected) > MOMENTS_TOLERANCE * scales[key]).any():
                    self.report(
                        "R-MOMENT-3", name, f"{site}/{key} is not that of the decoded values"
                    )


def _scales(moments: GroupMoments) -> dict[str, Array]:
    """Tensor → what its errors are relative to: see R-MOMENT-3."""
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
