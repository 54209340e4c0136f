"""Reading a store: `open_store` checks its records; every byte read is checked against its CRC."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.files import DamagedFileError, read_sealed, sha256_file
from mlsae.store.arrays import ArrayReader, OpenFiles
from mlsae.store.commit import num_shards_of, pending_shards
from mlsae.store.encoding import STORED_DTYPE, check_encoding, decode
from mlsae.store.errors import DamagedStoreError, IncompleteStoreError
from mlsae.store.moments import GroupMoments, Moments, eligible_groups, from_bytes
from mlsae.store.plan import plan_id_of, read_plan
from mlsae.store.rowindex import RowIndex
from mlsae.store.schema import COMPLETE, MOMENTS, PROVENANCE, SETUP, activation_array

Array = npt.NDArray[Any]


def open_store(path: str | os.PathLike[str], *, incomplete: bool = False) -> "Store":
    """Open an activation store for reading.

    Checks the plan, the records and the Zarr metadata; activations are checked as they are read.

    Args:
        path: the store's directory.
        incomplete: also open a store whose tokens are written but whose activations are not all
            there; its tokens can be read, its moments and `store_id` cannot.

    Raises:
        NotAStoreError: there is no store at `path`.
        IncompleteStoreError: the store's producer has not finished.
        SchemaVersionError: the store is of a version that this package cannot read.
        DamagedStoreError: a record or metadata file is missing or damaged.
    """
    return Store(Path(path), incomplete=incomplete)


class Store:
    """An activation store, open for reading. Threads may share it."""

    def __init__(self, path: Path, *, incomplete: bool = False) -> None:
        self.path = path
        self.plan: dict[str, Any] = read_plan(path)
        self.plan_id = plan_id_of(self.plan)
        self.is_complete = (path / COMPLETE).exists()
        if not self.is_complete and not (incomplete and (path / SETUP).exists()):
            total = num_shards_of(self.plan)
            done = total - len(pending_shards(path, self.plan))
            raise IncompleteStoreError(
                f"{path} is incomplete: {done} of {total} shards are committed; "
                f"run the same harvest again to finish it"
            )
        self._check_records()
        self.schema_version: str = self.plan["schema_version"]
        self.source: dict[str, Any] = self.plan["source"]
        """What made the values, as the producer gave it to `create`."""
        self.num_tokens: int = self.plan["num_tokens"]
        self.context_length: int = self.plan["context_length"]
        self.num_sequences = self.num_tokens // self.context_length
        self.sites: tuple[str, ...] = tuple(self.plan["sites"])
        self.layers: tuple[int, ...] = tuple(self.plan["layers"])
        self.d_model: int = self.plan["d_model"]
        self.encoding = check_encoding(self.plan["encoding"])
        self.dtype = STORED_DTYPE[self.encoding]
        self.itemsize = self.dtype.itemsize
        self.chunk_rows: int = self.plan["chunk_rows"]
        self.shard_rows: int = self.plan["shard_rows"]
        self._files = OpenFiles()
        self._index = RowIndex(path, self.plan, self._files)
        self.num_rows = self._index.num_rows
        self.rows_per_sequence = self._index.rows_per_sequence
        """Row r belongs to sequence r // rows_per_sequence."""
        self._readers: dict[tuple[str, int], ArrayReader] = {}
        self._group_moments: dict[str, GroupMoments] | None = None

    @property
    def store_id(self) -> str:
        """Hex SHA-256 that names this store's plan and content."""
        self._require_complete()
        return str(self._complete["store_id"])

    def provenance(self) -> list[dict[str, Any]]:
        """How the runs that wrote this store were made, as their producers said; oldest first.

        Raises:
            DamagedStoreError: a record does not hold the bytes that were written.
        """
        try:
            records = [read_sealed(file) for file in (self.path / PROVENANCE).glob("*.json")]
        except DamagedFileError as error:
            raise DamagedStoreError(str(error)) from None
        return sorted(records, key=lambda record: str(record.get("started", "")))

    def tokens(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint32]:
        """(stop − start,) token ids, by token."""
        return self._index.readers["tokens"].read(start, stop)

    def documents(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint32]:
        """(stop − start,) index of each token's document, by token."""
        return self._index.readers["documents"].read(start, stop)

    def token_flags(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """(stop − start,) bits SPECIAL, PADDING, MASKED, by token."""
        return self._index.readers["token_flags"].read(start, stop)

    def row_tokens(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """(stop − start,) index of the token that each row belongs to."""
        return self._index.tokens(start, self.num_rows if stop is None else stop)

    def row_flags(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """(stop − start,) bits SPECIAL, PADDING, MASKED of each row's token."""
        return self._index.flags(start, self.num_rows if stop is None else stop)

    def row_groups(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int8]:
        """(stop − start,) index into `mlsae.store.moments.GROUPS` of each row."""
        return self._index.groups(start, self.num_rows if stop is None else stop)

    def positions(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """(stop − start,) position of each row within its sequence."""
        return self._index.positions(start, self.num_rows if stop is None else stop)

    def eligible(
        self, skip_positions: int = 1, start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.bool_]:
        """(stop − start,) whether each row has no flag set and a position ≥ skip_positions."""
        eligible: npt.NDArray[np.bool_] = self.row_flags(start, stop) == 0
        eligible &= self.positions(start, stop) >= skip_positions
        return eligible

    def check_site(self, site: str | None) -> str:
        """The site asked for, or the only one.

        Raises:
            InputError: the store does not hold it, or none was given and it holds several.
        """
        if site is None and len(self.sites) > 1:
            raise InputError(f"{self.path} holds several sites, {', '.join(self.sites)}: name one")
        if site is not None and site not in self.sites:
            held = ", ".join(self.sites)
            raise InputError(f"{self.path} does not hold site {site}; it has {held}")
        return site or self.sites[0]

    def check_layers(self, layers: Iterable[int] | None) -> tuple[int, ...]:
        """The layers asked for, ascending, or all.

        Raises:
            InputError: one is not in the store, or none is asked for.
        """
        wanted = tuple(sorted(set(self.layers if layers is None else layers)))
        missing = [layer for layer in wanted if layer not in self.layers]
        if missing or not wanted:
            raise InputError(
                f"{self.path} does not hold layer {', '.join(map(str, missing)) or '(none given)'}"
                f"; it has {', '.join(map(str, self.layers))}"
            )
        return wanted

    def reader(self, site: str, layer: int) -> ArrayReader:
        """Rows of one activation array, (n, d_model) of the stored data type.

        Raises:
            InputError: the store has no such site or layer.
            IncompleteStoreError: the activations are not all there.
        """
        self._require_complete()
        key = (self.check_site(site), self.check_layers([layer])[0])
        if key not in self._readers:
            self._readers[key] = ArrayReader(
                self.path / activation_array(*key),
                num_rows=self.num_rows,
                row_shape=(self.d_model,),
                dtype=self.dtype,
                chunk_rows=self.chunk_rows,
                shard_rows=self.shard_rows,
                files=self._files,
            )
        return self._readers[key]

    def read(self, site: str, layer: int, start: int = 0, stop: int | None = None) -> Array:
        """(stop − start, d_model) stored values; `decode` widens them.

        Raises:
            InputError: no such site, layer or rows.
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        return self.reader(site, layer).read(start, stop)

    def decode(self, stored: Array) -> npt.NDArray[np.float32]:
        """Stored values → float32 of the same shape; exact."""
        return decode(stored, self.encoding)

    def moments(self, site: str | None = None, skip_positions: int = 1) -> Moments:
        """Moments of the eligible rows of a site, every layer, merged exactly from the groups.

        Raises:
            InputError: no such site, or skip_positions is not in 0 … 16.
            DamagedStoreError: the moments object is missing or damaged.
        """
        groups = eligible_groups(skip_positions)
        if self._group_moments is None:
            self._group_moments = self._load_moments()
        return self._group_moments[self.check_site(site)].select(groups)

    def _load_moments(self) -> dict[str, GroupMoments]:
        self._require_complete()
        path = self.path / MOMENTS
        data = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(data).hexdigest() != self._complete["moments_sha256"]:
            raise DamagedStoreError(f"{path} is missing or damaged; restore it from a copy")
        return from_bytes(data, self.sites, self.layers, self.d_model)

    def _require_complete(self) -> None:
        if not self.is_complete:
            raise IncompleteStoreError(f"{self.path} is incomplete: only its tokens can be read")

    def _check_records(self) -> None:
        names = [SETUP, COMPLETE] if self.is_complete else [SETUP]
        records: dict[str, Mapping[str, Any]] = {}
        for name in names:
            try:
                records[name] = read_sealed(self.path / name)
            except FileNotFoundError:
                raise DamagedStoreError(
                    f"{self.path}: {name} is missing; restore it from a copy"
                ) from None
            except DamagedFileError as error:
                raise DamagedStoreError(str(error)) from None
            if records[name].get("plan_id") != self.plan_id:
                raise DamagedStoreError(
                    f"{self.path}: {name} belongs to another plan; restore the store from a copy"
                )
        for name, digest in records[SETUP]["metadata"].items():
            file = self.path / name
            if not file.exists() or sha256_file(file) != digest:
                raise DamagedStoreError(f"{file} is missing or damaged; restore it from a copy")
        self._complete = records.get(COMPLETE, {})
