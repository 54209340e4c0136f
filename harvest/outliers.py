"""Warnings of layers whose variance a few rows or one channel hold: an SAE learns those first."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mlsae.store import Store

FEW_ROWS = 0.001
LARGE_SHARE = 0.1
SAMPLED_ROWS = 1 << 16
PIECE_ROWS = 1 << 10


def outlier_lines(store: Store, site: str) -> Iterator[str]:
    """Warn of each layer where fewer than 0.1% of the rows, or one channel, hold over 10% of the
    variance.

    Channels are exact, from the store's moments. Rows are a sample of 65,536, in pieces spread
    evenly over the store. Only eligible rows count: position 0 and special tokens are out.
    """
    moments = store.moments(site, skip_positions=1)
    if moments.count == 0:
        return
    num_rows = 0
    for place, layer in enumerate(store.layers):
        total = moments.m2[place].sum()
        channel = int(moments.m2[place].argmax())
        share = moments.m2[place, channel] / total if total > 0 else 0.0
        if share > LARGE_SHARE:
            yield (
                f"warning: layer {layer} ({site}): channel {channel} holds {share:.0%} of the "
                "variance; `mlsae train --loss-space standardized` weighs rows, not channels, alike"
            )
        distances = _squared_distances(store, site, layer, moments.mean[place])
        num_rows = len(distances)
        few = int(num_rows * FEW_ROWS)
        if few and (held := _share_of_largest(distances, few)) > LARGE_SHARE:
            yield (
                f"warning: layer {layer} ({site}): {few} of {num_rows:,} sampled rows hold "
                f"{held:.0%} of the variance; look at them before you train, or leave out more "
                "first positions with --skip-positions"
            )


def _share_of_largest(distances: npt.NDArray[np.float64], few: int) -> float:
    total = distances.sum()
    return float(np.partition(distances, -few)[-few:].sum() / total) if total > 0 else 0.0


def _squared_distances(
    store: Store, site: str, layer: int, mean: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """‖x − mean‖² of sampled eligible rows."""
    num_pieces = max(1, min(SAMPLED_ROWS, store.num_rows) // PIECE_ROWS)
    starts = np.linspace(0, max(store.num_rows - PIECE_ROWS, 0), num_pieces).astype(int)
    found = []
    for start in np.unique(starts).tolist():
        stop = min(start + PIECE_ROWS, store.num_rows)
        x = store.read(site, layer, start, stop)[store.eligible(1, start, stop)]
        centred = x.astype(np.float64) - mean
        found.append(np.einsum("nd,nd->n", centred, centred))
    return np.concatenate(found)
