"""Sums of squares about a mean: rounding leaves some where nothing varies."""

from typing import Any

_OF_SUM, _OF_REFERENCE = 1e-14, 1e-26
_LEAST_SHARE, _LEAST_SHARE_STANDARDIZED = 1e-12, 1e-10


def rounding_left(squares: Any, num_rows: Any, reference_square: float) -> Any:
    """The most that rounding leaves of Σ‖x − μ‖² over rows that are all alike.

    Σ‖x − μ‖² = Σ‖x − c‖² − ‖Σ(x − c)‖² / n, with sums in float64 about a reference c near the rows.

    Args:
        squares: Σ‖x − c‖², a number or an array.
        num_rows: n, likewise.
        reference_square: ‖c‖².
    """
    return _OF_SUM * squares + _OF_REFERENCE * num_rows * reference_square


def least_share(*, standardized: bool) -> float:
    """Share of a mean ‖u‖² below which the variance of rows is none, but rounding to 32 bits.

    Args:
        standardized: rows are standardised: those that differ in length alone are apart by the
            1e-5 that is added to their standard deviations.
    """
    return _LEAST_SHARE_STANDARDIZED if standardized else _LEAST_SHARE
