"""Several stores of one model over different text, read as if they were one.

Rows, tokens and sequences are counted through: first the first store's, then the next one's.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.files import Location, canonical_json
from mlsae.base.units import whole
from mlsae.store.format.calibration import Calibration
from mlsae.store.format.encoding import Stored
from mlsae.store.format.moments import GroupMoments, Moments, eligible_groups
from mlsae.store.read.interface import AnyStore
from mlsae.store.read.store import RowReader, Store, open_store
from mlsae.store.read.together import check_together

Array = npt.NDArray[Any]


def open_corpus(
    locations: Location | Iterable[Location],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> AnyStore:
    """Open one store, or several as one.

    Args:
        locations: one, or some in any order.
        cache_dir: argument of `open_store`.
        cache_bytes: argument of `open_store`; for all of them together.

    Returns:
        The store where there is one location, else a `Corpus`.

    Raises:
        InputError: the stores are not of one model, or hold the same text.
        StoreError: as `open_store`.
    """
    if isinstance(locations, str | os.PathLike):
        locations = [locations]
    stores = [
        open_store(location, cache_dir=cache_dir, cache_bytes=cache_bytes) for location in locations
    ]
    if not stores:
        raise InputError("give at least one store")
    return stores[0] if len(stores) == 1 else Corpus(stores)


class Borders:
    """Borders between stores, in a count that goes through all.

    Args:
        what: name of the counted things, for messages.
        sizes: number of the things in each store.
    """

    def __init__(self, what: str, sizes: Iterable[int]) -> None:
        self._what = what
        self.starts = [0, *accumulate(sizes)]
        """First item of each store, then the number of all items."""

    @property
    def total(self) -> int:
        """Number of all items."""
        return self.starts[-1]

    def spans(self, start: int, stop: int | None) -> Iterator[tuple[int, int, int]]:
        """(store, first, end) in the store's own count of the items start … stop − 1.

        At least one, so that no items have a type too.

        Raises:
            InputError: there are no such items.
        """
        start = whole(f"the first of {self._what}", start)
        stop = self.total if stop is None else whole(f"the end of {self._what}", stop)
        if not 0 <= start <= stop <= self.total:
            raise InputError(f"{self._what} {start} to {stop} are not in 0 to {self.total}")
        at = min(bisect_right(self.starts, start), len(self.starts) - 1) - 1
        while True:
            first = self.starts[at]
            yield at, start - first, min(stop, self.starts[at + 1]) - first
            at += 1
            start = self.starts[at]
            if stop <= start:
                return

    def origin(self, items: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(n,) index of each item's store, for (n,) items."""
        return np.searchsorted(self.starts[1:-1], items, side="right").astype(np.int64)


class CorpusReader:
    """Rows of one site and layer as they are stored. Threads may share it."""

    def __init__(self, readers: Sequence[RowReader], borders: Borders) -> None:
        self.parts = readers[0].parts
        """Width and data type of each array, as for a `RowReader`."""
        self._readers = readers
        self._borders = borders

    @property
    def segments(self) -> list[tuple[int, RowReader]]:
        """See `AnyReader`."""
        return list(zip(self._borders.starts, self._readers, strict=False))

    def read(self, start: int = 0, stop: int | None = None) -> Stored:
        """See `AnyReader`."""
        pieces = [
            self._readers[at].read(first, end)
            for at, first, end in self._borders.spans(start, stop)
        ]
        return tuple(_joined(parts) for parts in zip(*pieces, strict=True))

    def read_into(self, out: Sequence[Array], start: int) -> None:
        """See `AnyReader`."""
        done = 0
        for at, first, end in self._borders.spans(start, start + len(out[0])):
            pieces = [part[done : done + end - first] for part in out]
            self._readers[at].read_into(pieces, first)
            done += end - first


class Corpus:
    """Several stores as one, open for reading. Threads may share it.

    A corpus is an `AnyStore`, as each `Store` is. Its stores are ordered by id, however they were
    given.

    Args:
        stores: complete ones, at least one.

    Raises:
        InputError: the stores differ in model, sites or layers, or hold the same text; the message
            names the difference.
    """

    def __init__(self, stores: Iterable[Store]) -> None:
        self.stores: tuple[Store, ...] = tuple(sorted(stores, key=lambda store: store.store_id))
        """The stores, ascending by `store_id`."""
        check_together(self.stores)
        first = self.stores[0]
        self.place = " + ".join(store.place for store in self.stores)
        """Directories and URLs."""
        self.is_local = all(store.is_local for store in self.stores)
        self.store_id = combined_id(store.store_id for store in self.stores)
        """Hex SHA-256 of the stores' ids, sorted: a list in canonical JSON."""
        self.plan_id = combined_id(store.plan_id for store in self.stores)
        """Hex SHA-256 of the stores' plan ids, sorted: a list in canonical JSON."""
        self.source: Mapping[str, Any] = {
            key: value
            for key, value in first.source.items()
            if all(store.source.get(key) == value for store in self.stores)
        }
        """Entries of `source` that all stores share."""
        self.context_length = first.context_length
        self.rows_per_sequence = first.rows_per_sequence
        """Row r belongs to sequence r // rows_per_sequence."""
        self.sites = first.sites
        self.layers = first.layers
        self.d_model = first.d_model
        self.encoding = first.encoding
        self.parts = first.parts
        """The arrays that hold a site and layer: one, and for int8 a second."""
        self.row_bytes = first.row_bytes
        """Bytes of a stored row at one site and layer, before compression."""
        self.is_compressed = any(store.is_compressed for store in self.stores)
        self._rows = Borders("rows", (store.num_rows for store in self.stores))
        self._tokens = Borders("tokens", (store.num_tokens for store in self.stores))
        self._sequences = Borders("sequences", (store.num_sequences for store in self.stores))
        self.num_rows = self._rows.total
        self.num_tokens = self._tokens.total
        self.num_sequences = self._sequences.total
        self._readers: dict[tuple[str, int], CorpusReader] = {}
        self._group_moments: dict[str, GroupMoments] | None = None

    __repr__ = Store.__repr__

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the stores anew."""
        return Corpus, (self.stores,)

    @property
    def calibrations(self) -> tuple[Calibration | None, ...]:
        """See `AnyStore`."""
        return tuple(store.calibration for store in self.stores)

    def row_origin(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """See `AnyStore`."""
        return self._rows.origin(rows)

    def tokens(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint32]:
        """See `AnyStore`."""
        return self._read(self._tokens, Store.tokens, start, stop)

    def documents(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint32]:
        """See `AnyStore`."""
        return self._read(self._tokens, Store.documents, start, stop)

    def token_flags(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """See `AnyStore`."""
        return self._read(self._tokens, Store.token_flags, start, stop)

    def row_tokens(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """See `AnyStore`."""
        return _joined(
            [
                self.stores[at].row_tokens(first, end) + self._tokens.starts[at]
                for at, first, end in self._rows.spans(start, stop)
            ]
        )

    def row_flags(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """See `AnyStore`."""
        return self._read(self._rows, Store.row_flags, start, stop)

    def row_groups(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int8]:
        """See `AnyStore`."""
        return self._read(self._rows, Store.row_groups, start, stop)

    def positions(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """See `AnyStore`."""
        return self._read(self._rows, Store.positions, start, stop)

    def eligible(
        self, skip_positions: int = 1, start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.bool_]:
        """See `AnyStore`."""
        return self._read(
            self._rows,
            lambda store, first, end: store.eligible(skip_positions, first, end),
            start,
            stop,
        )

    def check_site(self, site: str | None) -> str:
        """See `AnyStore`."""
        return self.stores[0].check_site(site)

    def check_layers(self, layers: Iterable[int] | None) -> tuple[int, ...]:
        """See `AnyStore`."""
        return self.stores[0].check_layers(layers)

    def reader(self, site: str, layer: int) -> CorpusReader:
        """See `AnyStore`."""
        key = (self.check_site(site), self.check_layers([layer])[0])
        if key not in self._readers:
            self._readers[key] = CorpusReader(
                [store.reader(*key) for store in self.stores], self._rows
            )
        return self._readers[key]

    def read(
        self, site: str, layer: int, start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.float32]:
        """See `AnyStore`."""
        return self._read(
            self._rows, lambda store, first, end: store.read(site, layer, first, end), start, stop
        )

    def moments(self, site: str | None = None, skip_positions: int = 1) -> Moments:
        """See `AnyStore`."""
        groups = eligible_groups(skip_positions)
        return self.group_moments()[self.check_site(site)].select(groups)

    def group_moments(self) -> Mapping[str, GroupMoments]:
        """See `AnyStore`."""
        if self._group_moments is None:
            merged = {site: GroupMoments(self.layers, self.d_model) for site in self.sites}
            for store in self.stores:
                for site, of_site in store.group_moments().items():
                    merged[site].merge(of_site)
            self._group_moments = merged
        return self._group_moments

    def _read(
        self,
        borders: Borders,
        read: Callable[[Store, int, int], Array],
        start: int,
        stop: int | None,
    ) -> Array:
        return _joined(
            [read(self.stores[at], first, end) for at, first, end in borders.spans(start, stop)]
        )


def combined_id(ids: Iterable[str]) -> str:
    """Hex SHA-256 of the ids, sorted: a list in canonical JSON."""
    return hashlib.sha256(canonical_json(sorted(ids))).hexdigest()


def sequence_origin(
    store: AnyStore, sequences: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Store of each of (n,) sequences, as (n,) index into `stores`, and (n,) numbers within it."""
    borders = Borders("sequences", (member.num_sequences for member in store.stores))
    origin = borders.origin(sequences)
    return origin, sequences - np.array(borders.starts)[origin]


def _joined(pieces: Sequence[Array]) -> Array:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
