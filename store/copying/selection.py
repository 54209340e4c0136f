"""Part of a store that a copy holds: layers, sites, whole sequences, an encoding."""

from dataclasses import dataclass

from mlsae.base.errors import InputError
from mlsae.store.format.encoding import Encoding
from mlsae.store.format.presets import resolve_preset
from mlsae.store.read.store import Store


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Part of a store that a copy holds, and its encoding."""

    layers: tuple[int, ...]
    sites: tuple[str, ...]
    sequences: tuple[int, int]
    """The first, and the one after the last."""
    encoding: Encoding
    compression: str


def select(
    store: Store,
    *,
    layers: tuple[int, ...] | None = None,
    sites: tuple[str, ...] | None = None,
    rows: tuple[int, int] | None = None,
    encoding: str | None = None,
) -> Selection | None:
    """Check a selection against a store.

    Args:
        store: to be copied.
        layers: to keep; None for all.
        sites: to keep; None for all.
        rows: first row and the row after the last; None for all.
        encoding: name of a preset; None for that of the store.

    Returns:
        The choice; None where it is the whole store as it is.

    Raises:
        InputError: the store has no such layers, sites or rows, or the rows are no whole sequences.
    """
    wanted = store.plan.preset if encoding is None else resolve_preset(encoding)
    for site in sites or ():
        store.check_site(site)
    chosen = Selection(
        layers=store.check_layers(layers),
        sites=tuple(site for site in store.sites if sites is None or site in sites),
        sequences=_sequences(store, rows),
        encoding=wanted.encoding,
        compression=wanted.compression,
    )
    is_whole = (
        chosen.layers == store.layers
        and chosen.sites == store.sites
        and chosen.sequences == (0, store.num_sequences)
        and wanted == store.plan.preset
    )
    return None if is_whole else chosen


def _sequences(store: Store, rows: tuple[int, int] | None) -> tuple[int, int]:
    if rows is None:
        return 0, store.num_sequences
    start, stop = rows
    per = store.rows_per_sequence
    if stop > store.num_rows:
        raise InputError(f"--rows {start}:{stop}: {store.place} has rows 0:{store.num_rows}")
    if start % per or stop % per:
        raise InputError(
            f"--rows {start}:{stop} would cut a sequence of {per} rows; "
            f"{start // per * per}:{-(-stop // per) * per} are whole ones"
        )
    if start and store.plan.keep_positions is not None:
        raise InputError(
            f"--rows {start}:{stop}: {store.place} holds some positions of each sequence, and "
            f"which ones follows from the sequence's number, so a copy has to begin with row 0: "
            f"--rows 0:{stop}"
        )
    return start // per, stop // per
