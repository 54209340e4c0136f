"""Reading a store: `open_store` checks its records; every byte read is checked against its CRC."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.files import Location, in_its_place
from mlsae.base.units import counted, portion, whole
from mlsae.store.errors import DamagedStoreError, IncompleteStoreError, InvalidStoreError
from mlsae.store.format.calibration import Calibration
from mlsae.store.format.encoding import Part, Stored
from mlsae.store.format.metadata import is_consolidated
from mlsae.store.format.moments import (
    GroupMoments,
    Moments,
    eligible_groups,
    from_bytes,
    moments_bytes,
)
from mlsae.store.places.objects import Descriptor, Objects
from mlsae.store.places.remote import open_objects
from mlsae.store.read.arrays import ArrayReader
from mlsae.store.read.commits import pending_shards
from mlsae.store.read.records import (
    Completion,
    read_complete,
    read_plan,
    read_sealed_object,
    read_setup,
)
from mlsae.store.read.rowindex import RowIndex
from mlsae.store.read.setup import read_calibration, site_codecs
from mlsae.store.schema import (
    ARRAY_METADATA,
    COMPLETE,
    MOMENTS,
    PROVENANCE,
    ROW_TOKEN,
    SETUP,
)

Array = npt.NDArray[Any]
_HEADER_BYTES = 2**20
"""Most bytes in the header of a moments object."""
_METADATA_BYTES = 2**20
_REQUESTS = 16
"""Small objects asked for at once."""


def open_store(
    location: Location,
    *,
    incomplete: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> "Store":
    """Open an activation store for reading.

    Checks the plan, the records and the Zarr metadata; activations are checked as they are read.

    Args:
        location: a directory, or a URL: file://, https://, s3:// or hf://datasets/…
        incomplete: also open a store whose tokens are written but whose activations are not all
            there; its tokens can be read, its moments and `store_id` cannot.
        cache_dir: where chunks of a remote store are kept; the user's cache if not given.
        cache_bytes: most bytes kept there; 10 GiB if not given.

    Raises:
        NotAStoreError: there is no store at `location`.
        IncompleteStoreError: the store's producer has not finished.
        SchemaVersionError: the store is of a version that this package cannot read.
        DamagedStoreError: a record or metadata file is missing or damaged.
        InvalidStoreError: a record breaks the specification.
        RemoteError: the place cannot be reached.
    """
    objects = open_objects(location, cache_dir=cache_dir, cache_bytes=cache_bytes)
    return Store(objects, incomplete=incomplete)


class RowReader:
    """Rows of one site and layer as they are stored, in one or several parts.

    Threads may share it.
    """

    def __init__(self, parts: tuple[Part, ...], readers: tuple[ArrayReader, ...]) -> None:
        self.parts = parts
        """Width and data type of each array: one, and for int8 a second with the exponents."""
        self.arrays = readers
        self.num_rows = readers[0].num_rows
        self.chunk_rows = readers[0].chunk_rows
        self.chunks_per_shard = readers[0].chunks_per_shard

    @property
    def segments(self) -> list[tuple[int, "RowReader"]]:
        """First row and reader of each store that the rows are of: this one."""
        return [(0, self)]

    def read(self, start: int = 0, stop: int | None = None) -> Stored:
        """Rows start … stop − 1: for each part an array (stop − start, width).

        Raises:
            InputError: the range is not within the array.
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        return tuple(reader.read(start, stop) for reader in self.arrays)

    def read_into(self, out: Sequence[Array], start: int) -> None:
        """Fill arrays with the rows from `start` on.

        Args:
            out: for each part (n, width) of its data type, C-contiguous.
            start: first row; start + n may not pass the end.

        Raises:
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        for reader, values in zip(self.arrays, out, strict=True):
            reader.read_into(values, start)

    def files(self, chunk: int) -> list[Descriptor] | None:
        """For each part the file of a chunk, as `ArrayReader.file` says; None if one has none."""
        found = []
        for reader in self.arrays:
            if (file := reader.file(chunk)) is None:
                return None
            found.append(file)
        return found


class Store:
    """An activation store, open for reading. Threads may share it."""

    def __init__(self, objects: Objects, *, incomplete: bool = False) -> None:
        self.objects = objects
        self._may_be_incomplete = incomplete
        self.place = objects.place
        """Directory or URL."""
        self.is_local = objects.is_local
        """True where the bytes lie on this machine."""
        self.plan = read_plan(objects)
        self.plan_id = self.plan.id
        self.is_complete = objects.exists(COMPLETE)
        if not self.is_complete and not (incomplete and objects.exists(SETUP)):
            total = self.plan.num_shards
            done = total - len(pending_shards(objects, self.plan))
            raise IncompleteStoreError(
                f"{self.place} is incomplete: {portion(done, total, 'shard')} "
                f"committed; run the same harvest or copy again to finish it",
                rule="R-COMPLETE-1",
            )
        self.is_consolidated = False
        """True where a tool has added `consolidated_metadata` to the Zarr metadata of the group."""
        self._check_records()
        self.schema_version = self.plan.schema_version
        self.source: Mapping[str, Any] = self.plan.source
        """Origin of the values, as the producer gave it to `create`."""
        self.num_tokens = self.plan.num_tokens
        self.context_length = self.plan.context_length
        self.num_sequences = self.plan.num_sequences
        self.sites = self.plan.sites
        self.layers = self.plan.layers
        self.d_model = self.plan.d_model
        self.encoding = self.plan.encoding
        self.is_compressed = self.plan.compression is not None
        self.parts = self.plan.parts
        """The arrays that hold a site and layer: one, and for int8 a second."""
        self.row_bytes = sum(part.row_bytes for part in self.parts)
        """Bytes of a stored row at one site and layer, before compression."""
        self.chunk_rows = self.plan.chunk_rows
        self.shard_rows = self.plan.shard_rows
        self._index = RowIndex(objects, self.plan)
        self.num_rows = self.plan.num_rows
        self.rows_per_sequence = self.plan.rows_per_sequence
        """Row r belongs to sequence r // rows_per_sequence."""
        self.calibration: Calibration | None = read_calibration(objects, self.plan)
        """Channel means and scales by site, leading axis as `layers`; for int8 alone."""
        self.codecs = site_codecs(self.plan, self.calibration)
        self._readers: dict[tuple[str, int], RowReader] = {}
        self._group_moments: dict[str, GroupMoments] | None = None

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return (
            f"{type(self).__name__}({self.place!r}: {counted(self.num_rows, 'row')} of "
            f"{self.d_model} channels, {self.encoding}, {', '.join(self.sites)}, layers {layers})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the store anew."""
        return partial(Store, incomplete=self._may_be_incomplete), (self.objects,)

    @property
    def stores(self) -> tuple["Store", ...]:
        """This store alone; a `Corpus` has several."""
        return (self,)

    @property
    def calibrations(self) -> tuple[Calibration | None, ...]:
        """This store's calibration alone; a `Corpus` has one for each store."""
        return (self.calibration,)

    def row_origin(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(n,) index into `stores`, and so into `calibrations`, for each of (n,) rows: 0."""
        return np.zeros_like(rows)

    @property
    def store_id(self) -> str:
        """Hex SHA-256 that names this store's plan and content."""
        return self._completion().store_id

    def provenance(self) -> list[dict[str, Any]]:
        """Records of the runs that wrote this store, as their producers gave them; oldest first.

        Raises:
            DamagedStoreError: a record does not hold the bytes that were written.
            RemoteError: the place cannot be reached, or does not list its objects.
        """
        names = sorted(
            name
            for name, _ in self.objects.walk()
            if name.startswith(f"{PROVENANCE}/") and name.endswith(".json")
        )
        records = [read_sealed_object(self.objects, name) for name in names]
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
        """(stop − start,) index into `mlsae.store.format.moments.GROUPS` of each row."""
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
            raise InputError(f"{self.place} holds several sites, {', '.join(self.sites)}: name one")
        if site is not None and site not in self.sites:
            held = ", ".join(self.sites)
            raise InputError(f"{self.place} does not hold site {site}; it has {held}")
        return site or self.sites[0]

    def check_layers(self, layers: Iterable[int] | None) -> tuple[int, ...]:
        """The layers asked for, ascending, or all.

        Raises:
            InputError: one is not in the store, or none is asked for.
        """
        given = self.layers if layers is None else layers
        wanted = tuple(sorted({whole("a layer", layer) for layer in given}))
        missing = [layer for layer in wanted if layer not in self.layers]
        if missing or not wanted:
            raise InputError(
                f"{self.place} does not hold layer {', '.join(map(str, missing)) or '(none given)'}"
                f"; it has {', '.join(map(str, self.layers))}"
            )
        return wanted

    def reader(self, site: str, layer: int) -> RowReader:
        """Rows of one site and layer as they are stored.

        Raises:
            InputError: the store has no such site or layer.
            IncompleteStoreError: the activations are not all there.
        """
        self._completion()
        key = (self.check_site(site), self.check_layers([layer])[0])
        if key not in self._readers:
            self._readers[key] = RowReader(
                self.parts,
                tuple(
                    ArrayReader(self.objects, spec) for spec in self.plan.activation_arrays(*key)
                ),
            )
        return self._readers[key]

    def read(
        self, site: str, layer: int, start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.float32]:
        """(stop − start, d_model) float32: stored values, decoded.

        Raises:
            InputError: no such site, layer or rows.
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        return self.decode(self.reader(site, layer).read(start, stop), site, layer)

    def decode(self, parts: Stored, site: str, layer: int) -> npt.NDArray[np.float32]:
        """Rows of a site and layer as stored → (n, d_model) float32."""
        return self.codecs[site].decode(parts, self.layers.index(layer))

    def moments(self, site: str | None = None, skip_positions: int = 1) -> Moments:
        """Moments of a site's eligible rows, every layer, merged exactly from the groups.

        Raises:
            InputError: no such site, or skip_positions is not in 0 … 16.
            DamagedStoreError: the moments object is missing or damaged.
        """
        groups = eligible_groups(skip_positions)
        return self.group_moments()[self.check_site(site)].select(groups)

    def group_moments(self) -> Mapping[str, GroupMoments]:
        """Site → moments of every row, by group; not to be changed.

        Raises:
            DamagedStoreError: the moments object is missing or damaged.
        """
        if self._group_moments is None:
            self._group_moments = self._load_moments()
        return self._group_moments

    def _load_moments(self) -> dict[str, GroupMoments]:
        completion = self._completion()
        limit = moments_bytes(len(self.layers), len(self.sites), self.d_model) + _HEADER_BYTES
        try:
            data = self.objects.read(MOMENTS, limit)
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != completion.moments_sha256:
            raise DamagedStoreError(
                f"{self.place}/{MOMENTS} {damage_of(data)}",
                rule="R-MOMENT-2",
            )
        try:
            return from_bytes(data, self.sites, self.layers, self.d_model)
        except (KeyError, ValueError) as error:
            raise InvalidStoreError(
                f"{self.place}/{MOMENTS} does not hold this store's moments: {error}",
                rule="R-MOMENT-1",
            ) from None

    def _completion(self) -> Completion:
        if self._complete is None:
            raise IncompleteStoreError(f"{self.place} is incomplete: only its tokens can be read")
        return self._complete

    def _check_records(self) -> None:
        setup = read_setup(self.objects, self.plan_id)
        self._complete = read_complete(self.objects, self.plan_id) if self.is_complete else None
        expected = self.plan.metadata()
        # The plan says which names there are, so none that the record makes up becomes a path.
        wrong = setup.metadata.keys() ^ expected.keys()
        if wrong:
            raise InvalidStoreError(
                f"{self.place}/{SETUP}: metadata must name every zarr.json of the plan and no "
                f"other, not so {sorted(wrong)[0]!r}",
                rule="R-ROW-2" if wrong == {f"{ROW_TOKEN}/{ARRAY_METADATA}"} else "R-META-1",
            )
        if set(setup.objects) != set(self.plan.setup_objects()):
            raise InvalidStoreError(
                f"{self.place}/{SETUP}: objects must name every shard of the tokens and no other",
                rule="R-SETUP-2",
            )
        with ThreadPoolExecutor(1 if self.objects.is_local else _REQUESTS) as pool:
            contents = pool.map(self._metadata, expected)
            for name, data in zip(expected, contents, strict=True):
                if hashlib.sha256(data).hexdigest() == setup.metadata[name]:
                    continue
                if name == ARRAY_METADATA and is_consolidated(data, expected[name]):
                    self.is_consolidated = True
                    continue
                raise DamagedStoreError(f"{self.place}/{name} {damage_of(data)}", rule="R-META-1")

    def _metadata(self, name: str) -> bytes:
        try:
            return self.objects.read(name, _METADATA_BYTES)
        except FileNotFoundError:
            return b""


def damage_of(data: bytes) -> str:
    """Predicate and remedy for an object whose bytes are not those that were recorded."""
    return in_its_place(data) or "is missing or damaged; restore it from a copy"
