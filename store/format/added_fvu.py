"""Cost of an encoding: the fraction of variance that it leaves unexplained, by deciles of norm.

Added FVU of some rows = Σ‖x − decoded‖² / Σ‖x − their mean‖², x the values before encoding. In
total and for each decile of the rows' L2 norms, the mean being that of the rows named; the edges of
the deciles are those of the first rows that were added.

Shape suffixes: N rows, D channels, Q deciles.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.store.errors import ActivationError

NUM_DECILES = 10
MAX_ADDED_FVU = 1e-3
"""Most that a harvest accepts unless it is told otherwise."""
DECILES_FROM = 1000
"""Rows from which on a decile may refuse a shard: a few rows may by chance lie as close together as
no encoding could tell them apart."""

Array = npt.NDArray[Any]


class AddedFVU:
    """Added FVU of one layer; sums in float64."""

    def __init__(self) -> None:
        self._edges: Array | None = None
        self._about_D: Array | None = None
        self._count_Q = np.zeros(NUM_DECILES, np.int64)
        self._error_Q = np.zeros(NUM_DECILES)
        self._square_Q = np.zeros(NUM_DECILES)
        self._sum_QD: Array = np.zeros((NUM_DECILES, 1))

    def add(self, x_ND: Array, decoded_ND: Array) -> None:
        """Add eligible rows: floats before encoding, and their stored values, decoded."""
        if not len(x_ND):
            return
        x_ND = x_ND.astype(np.float64)
        norm_N = np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND))
        error_N = np.square(x_ND - decoded_ND).sum(axis=1)
        if self._edges is None or self._about_D is None:
            self._edges = np.quantile(norm_N, np.arange(1, NUM_DECILES) / NUM_DECILES)
            self._about_D = x_ND.mean(axis=0)
            self._sum_QD = np.zeros((NUM_DECILES, x_ND.shape[1]))
        # About a point near the mean, so that nothing cancels.
        x_ND -= self._about_D
        decile_N = np.searchsorted(self._edges, norm_N, side="right")
        is_in_QN = (decile_N == np.arange(NUM_DECILES)[:, None]).astype(np.float64)
        self._count_Q += np.bincount(decile_N, minlength=NUM_DECILES)
        self._error_Q += is_in_QN @ error_N
        self._square_Q += is_in_QN @ np.einsum("nd,nd->n", x_ND, x_ND)
        self._sum_QD += is_in_QN @ x_ND

    def result(self) -> dict[str, Any]:
        """Added FVU of the rows so far, as `added_fvu` gives it."""
        return added_fvu(self._count_Q, self._error_Q, self._square_Q, self._sum_QD)


def added_fvu(count_Q: Array, error_Q: Array, square_Q: Array, sum_QD: Array) -> dict[str, Any]:
    """Added FVU from sums over the rows of each decile.

    Args:
        count_Q: rows.
        error_Q: Σ‖x − decoded‖².
        square_Q: Σ‖x − c‖², c a point near the rows' mean.
        sum_QD: Σ (x − c).

    Returns:
        num_rows, total, by_decile (10; null where there are no rows or no variance).
    """
    by_decile = [
        _fvu(error, square, sum_D, int(count))
        for error, square, sum_D, count in zip(error_Q, square_Q, sum_QD, count_Q, strict=True)
    ]
    num_rows = int(count_Q.sum())
    total = _fvu(error_Q.sum(), square_Q.sum(), sum_QD.sum(axis=0), num_rows)
    return {"num_rows": num_rows, "total": total, "by_decile": by_decile}


def _fvu(error: float, square: float, sum_D: Array, count: int) -> float | None:
    if not count:
        return None
    variance = float(square) - float(np.square(sum_D).sum()) / count
    # Rounding errors of rows that are all alike are no variance.
    return float(error) / variance if variance > 1e-12 * float(square) else None


def check_added_fvu(added: Mapping[str, Any], shard: int, encoding: str, most: float) -> None:
    """Refuse a shard whose encoding costs too much.

    Args:
        added: site → layer (decimal) → the mapping that `added_fvu` gives.
        shard: index of the shard.
        encoding: encoding of the store.
        most: largest FVU that may be added, in total and, from 1,000 rows on, in each decile.

    Raises:
        ActivationError: the encoding adds too much; the message has layer, rows and remedy.
    """
    for site, layers in added.items():
        for layer, found in layers.items():
            values = found["by_decile"] if found["num_rows"] >= DECILES_FROM else ()
            by_decile = [(value, f"decile {i} of row norm") for i, value in enumerate(values, 1)]
            for value, rows in [(found["total"], "all its rows"), *by_decile]:
                if value is not None and value > most:
                    raise ActivationError(
                        f"shard {shard}, layer {layer} ({site}): encoding {encoding} adds an FVU "
                        f"of {value:.2g} over {rows}, more than {most:.2g}; use another "
                        f"--encoding, or allow it with --max-encoding-fvu"
                    )
