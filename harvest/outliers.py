"""Warnings of layers whose variance a few rows or one channel hold: an SAE learns those first."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mlsae.base.units import counted, format_ranges
from mlsae.store import Store
from mlsae.store.format.moments import Moments

FEW_ROWS = 0.001
LARGE_SHARE = 0.1
LARGE_TIMES = 4
"""Times its even share that a channel must hold too: of 8 channels, each holds over 10%."""
SAMPLED_ROWS = 1 << 16
PIECE_ROWS = 1 << 10


def outlier_lines(store: Store, site: str) -> Iterator[str]:
    """Warn where fewer than 0.1% of the rows, or one channel, hold over 10% of the variance.

    Each channel gets one line for all its layers, and so do the rows; a line says what is left of
    it in standardised rows, on which `mlsae train` trains by default. Channels are exact, from the
    store's moments. Rows are a sample of 65,536, in pieces spread evenly over the store. Only
    eligible rows count: position 0 and special tokens are out.
    """
    moments = store.moments(site, skip_positions=1)
    if moments.count == 0:
        return
    raw, standardised = _shares(moments.m2), _shares(moments.u_m2)
    largest, large = raw.argmax(axis=1), max(LARGE_SHARE, LARGE_TIMES / store.d_model)
    for channel in np.unique(largest).tolist():
        of = np.flatnonzero((largest == channel) & (raw.max(axis=1) > large))
        if len(of):
            yield (
                f"warning: {_where(store, site, of)}: channel {channel} holds "
                f"{_percents(raw[of, channel])} of the variance, and "
                f"{_percents(standardised[of, channel])} in standardised rows: "
                f"{_advice(standardised[of, channel], large)}"
            )
    num_rows = few = 0
    held = np.zeros((2, len(store.layers)))
    for place, layer in enumerate(store.layers):
        for kind, distances in enumerate(_distances(store, site, layer, moments)):
            num_rows = len(distances)
            few = int(num_rows * FEW_ROWS)
            held[kind, place] = _share_of_largest(distances, few)
    of = np.flatnonzero(held[0] > LARGE_SHARE)
    if len(of):
        advice = _advice(held[1, of], LARGE_SHARE)
        yield (
            f"warning: {_where(store, site, of)}: {few} of {counted(num_rows, 'sampled row')} "
            f"{'hold' if few > 1 else 'holds'} {_percents(held[0, of])} of the variance, and "
            f"{_percents(held[1, of])} where rows are standardised: {advice}"
        )


def _advice(left: npt.NDArray[np.float64], large: float) -> str:
    if left.max() <= large:
        return "train on those (the default), not with --normalize none or --loss-space raw"
    return (
        "FVU will say little else; look at the rows, and leave out more first positions with "
        "--skip-positions or layers with --layers"
    )


def _where(store: Store, site: str, of: npt.NDArray[np.int64]) -> str:
    layers = [store.layers[place] for place in of.tolist()]
    return f"layer{'s' if len(layers) > 1 else ''} {format_ranges(layers)} ({site})"


def _percents(shares: npt.NDArray[np.float64]) -> str:
    """Smallest and largest, or the one that both are."""
    low, high = (f"{share:.0%}" for share in (shares.min(), shares.max()))
    return low if low == high else f"{low.rstrip('%')}–{high}"


def _shares(m2: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(L, D) each channel's share of a layer's variance; 0 where it does not vary."""
    total = m2.sum(axis=1, keepdims=True)
    shares: npt.NDArray[np.float64] = np.zeros_like(m2)
    np.divide(m2, total, out=shares, where=total > 0)
    return shares


def _share_of_largest(distances: npt.NDArray[np.float64], few: int) -> float:
    total = distances.sum()
    if not few or total <= 0:
        return 0.0
    return float(np.partition(distances, -few)[-few:].sum() / total)


def _distances(
    store: Store, site: str, layer: int, moments: Moments
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """‖x − mean‖² of sampled eligible rows, and ‖u − mean‖² of the same rows standardised."""
    place = moments.layers.index(layer)
    num_pieces = max(1, min(SAMPLED_ROWS, store.num_rows) // PIECE_ROWS)
    starts = np.linspace(0, max(store.num_rows - PIECE_ROWS, 0), num_pieces).astype(int)
    raw: list[npt.NDArray[np.float64]] = []
    standardised: list[npt.NDArray[np.float64]] = []
    for start in np.unique(starts).tolist():
        stop = min(start + PIECE_ROWS, store.num_rows)
        rows = store.read(site, layer, start, stop)[store.eligible(1, start, stop)]
        x = rows.astype(np.float64)
        u = (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-5)
        for found, centred in (
            (raw, x - moments.mean[place]),
            (standardised, u - moments.u_mean[place]),
        ):
            found.append(np.einsum("nd,nd->n", centred, centred))
    return np.concatenate(raw), np.concatenate(standardised)
