"""Activations to be read, from one store or from several as one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mlsae.store.format.calibration import Calibration
from mlsae.store.format.encoding import Encoding, Part, Stored
from mlsae.store.format.moments import GroupMoments, Moments
from mlsae.store.read.store import RowReader, Store


class AnyReader(Protocol):
    """Rows of one site and layer as they are stored. Threads may share it."""

    parts: tuple[Part, ...]
    """Width and data type of each array: one, and for int8 a second with the exponents."""

    @property
    def segments(self) -> list[tuple[int, RowReader]]:
        """First row, counted through all stores, and reader of each store."""
        ...

    def read(self, start: int = 0, stop: int | None = None) -> Stored:
        """Rows start … stop − 1: for each part an array (stop − start, width) of its data type.

        Raises:
            InputError: there are no such rows.
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        ...

    def read_into(self, out: Sequence[npt.NDArray[Any]], start: int) -> None:
        """Fill arrays with the rows from `start` on.

        Args:
            out: for each part (n, width) of its data type, C-contiguous.
            start: first row; start + n may not pass the end.

        Raises:
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        ...


class AnyStore(Protocol):
    """Activations that are trained from and analyzed: a `Store`, or a `Corpus` of several.

    Tokens, rows and sequences are counted through all of `stores`, and a range start … stop − 1
    without a `stop` goes to the end. Threads may share it.
    """

    place: str
    """Directory or URL, for messages; joined by + for several stores."""
    is_local: bool
    """True where all bytes lie on this machine."""
    plan_id: str
    """Hex SHA-256 of the plan; for several stores, of their plan ids."""
    source: Mapping[str, Any]
    """JSON object on the origin of the values, as far as all producers agree."""
    context_length: int
    """Tokens of a sequence."""
    rows_per_sequence: int
    """Rows of a sequence: row r belongs to sequence r // rows_per_sequence."""
    sites: tuple[str, ...]
    """Sites that are stored."""
    layers: tuple[int, ...]
    """Layers that are stored, ascending."""
    d_model: int
    """Channels of an activation."""
    encoding: Encoding
    """Form in which activations are held."""
    parts: tuple[Part, ...]
    """Arrays that hold a site and layer: one, and for int8 a second."""
    row_bytes: int
    """Bytes of a stored row at one site and layer, before compression."""
    is_compressed: bool
    """True where chunks of any store are compressed."""
    num_rows: int
    """Rows of each site and layer."""
    num_tokens: int
    """Tokens of the text."""
    num_sequences: int
    """Sequences of the text."""

    @property
    def store_id(self) -> str:
        """Hex SHA-256 of plan and content; for several stores, of their ids."""
        ...

    @property
    def stores(self) -> tuple[Store, ...]:
        """Stores that are read, by `store_id`; facts about one alone are found there."""
        ...

    @property
    def calibrations(self) -> tuple[Calibration | None, ...]:
        """Each store's calibration, as `stores`; None where its encoding is not int8."""
        ...

    def row_origin(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(n,) int64 index into `stores`, and so into `calibrations`, for each of (n,) rows."""
        ...

    def tokens(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint32]:
        """(stop − start,) uint32 token ids, by token."""
        ...

    def documents(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint32]:
        """(stop − start,) uint32 index of each token's document in its own store, by token."""
        ...

    def token_flags(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """(stop − start,) uint8 bits SPECIAL, PADDING, MASKED, by token."""
        ...

    def row_tokens(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """(stop − start,) int64 index of the token that each row belongs to."""
        ...

    def row_flags(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """(stop − start,) uint8 bits SPECIAL, PADDING, MASKED of each row's token."""
        ...

    def row_groups(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int8]:
        """(stop − start,) int8 index into `mlsae.store.format.moments.GROUPS` of each row."""
        ...

    def positions(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """(stop − start,) int64 position of each row within its sequence."""
        ...

    def eligible(
        self, skip_positions: int = 1, start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.bool_]:
        """(stop − start,) bool: the row has no flag set and a position ≥ skip_positions."""
        ...

    def check_site(self, site: str | None) -> str:
        """The site asked for, or the only one.

        Raises:
            InputError: the site is not stored, or none was given and several are.
        """
        ...

    def check_layers(self, layers: Iterable[int] | None) -> tuple[int, ...]:
        """The layers asked for, ascending, or all.

        Raises:
            InputError: a layer is not stored, or none is asked for.
        """
        ...

    def reader(self, site: str, layer: int) -> AnyReader:
        """Rows of one site and layer as they are stored.

        Raises:
            InputError: there is no such site or layer.
            IncompleteStoreError: the activations are not all there.
        """
        ...

    def read(
        self, site: str, layer: int, start: int = 0, stop: int | None = None
    ) -> npt.NDArray[np.float32]:
        """(stop − start, d_model) float32: stored values, each decoded as its own store says.

        Raises:
            InputError: there is no such site or layer, or there are no such rows.
            DamagedStoreError: a chunk's bytes are missing or differ from its checksum.
        """
        ...

    def moments(self, site: str | None = None, skip_positions: int = 1) -> Moments:
        """Moments of a site's eligible rows, all layers, merged exactly from the groups.

        Raises:
            InputError: there is no such site, or skip_positions is not in 0 … 16.
            DamagedStoreError: a moments object is missing or damaged.
        """
        ...

    def group_moments(self) -> Mapping[str, GroupMoments]:
        """Site → moments of every row, by group; not to be changed.

        Raises:
            DamagedStoreError: a moments object is missing or damaged.
        """
        ...
