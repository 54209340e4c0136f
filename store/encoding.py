"""How an activation is held in bytes: float32, float16, or bfloat16 as uint16 bit patterns."""

from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.store.errors import ActivationError

Encoding = Literal["float16", "bfloat16", "float32"]
Array = npt.NDArray[Any]

STORED_DTYPE: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
}
"""Encoding → data type of the Zarr array. Zarr v3 has no bfloat16, so its bits are uint16."""


def check_encoding(encoding: str) -> Encoding:
    """Return `encoding` if it is one of the three.

    Raises:
        InputError: naming those that exist.
    """
    if encoding not in STORED_DTYPE:
        raise InputError(f"encoding {encoding!r} is not one of {', '.join(STORED_DTYPE)}")
    return cast("Encoding", encoding)


def encode(values: Array, encoding: Encoding) -> Array:
    """Float activations → stored values, rounding to nearest, ties to even.

    Args:
        values: any shape; float16, float32 or float64. An array that already has the stored data
            type (uint16 bit patterns for bfloat16) is returned as it is.
        encoding: the store's encoding.

    Raises:
        ActivationError: the data type is no float, or a finite value has no finite image.
    """
    stored = STORED_DTYPE[encoding]
    if values.dtype == stored:
        return values
    if values.dtype.kind != "f":
        raise ActivationError(
            f"activations for encoding {encoding} must be floats or {stored.name}, "
            f"got {values.dtype.name}"
        )
    with np.errstate(over="ignore"):
        single = values.astype("<f4", copy=False)
        if encoding == "bfloat16":
            bits = single.view("<u4")
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            # Rounding would carry a NaN's payload into the sign bit; the largest NaN stays one.
            return np.where(np.isnan(single), 0x7FC0, rounded).astype(stored)
        return single.astype(stored, copy=False)


def decode_finite_into(stored: Array, encoding: Encoding, out: Array) -> None:
    """Stored values → float32 or float64 in `out`, of the same shape; exact, and without a copy.

    Faster than `decode` by a factor, but of float16 infinity and NaN make finite values over
    65,504, the largest float16.
    """
    if out.dtype != np.float32 or encoding == "float32":
        with np.errstate(invalid="ignore"):  # A signalling NaN is a NaN like any other here.
            out[...] = decode(stored, encoding)
    elif encoding == "bfloat16":
        np.left_shift(stored, 16, out=out.view("<u4"), dtype="<u4")
    else:
        # Exponent and fraction where float32 has them, the sign in its place; then the difference
        # of the exponents' biases, 127 − 15. numpy's own cast converts one value at a time.
        bits = out.view("<i4")
        np.left_shift(stored.view("<i2"), 13, out=bits, dtype="<i4")
        bits &= np.int32(-0x70002000)
        out *= np.float32(2.0**112)


def decode(stored: Array, encoding: Encoding) -> npt.NDArray[np.float32]:
    """Stored values → float32 of the same shape; exact for every encoding."""
    if encoding == "bfloat16":
        return (stored.astype("<u4") << 16).view("<f4")
    return stored.astype("<f4", copy=False)
