"""Bytes of an activation: float32, float16, bfloat16 bit patterns, or int8 with scales.

Shape suffixes: L layers, N rows, D channels, B blocks of channels, C channels of a block, K
exponents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.store.errors import ActivationError, NotFiniteError
from mlsae.store.schema import ACTIVATIONS, BLOCK_EXPONENTS

Encoding = Literal["float16", "bfloat16", "float32", "int8"]
Array = npt.NDArray[Any]
Stored = tuple[Array, ...]
"""Stored values of some rows: one array for each of `parts_of`, (N, width)."""

STORED_DTYPE: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
}
"""Encoding → data type of an activation. Zarr v3 has no bfloat16, so its bits are uint16."""
BLOCK_CHANNELS = 64
"""Channels of a row that share an exponent in int8; the last block may be short."""
MAX_QUANTUM = 127
MIN_EXPONENT, MAX_EXPONENT = -128, 127
EIGHTHS = 8
"""An exponent counts eighths of a power of two."""
POWERS = np.exp2(np.arange(MIN_EXPONENT, MAX_EXPONENT + 1) / EIGHTHS).astype(np.float32)
"""2^(k / 8) for every exponent k, ascending."""


@dataclass(frozen=True)
class Part:
    """One Zarr array among those that hold a site and layer."""

    folder: str
    """Group of the array, above site and layer."""
    dtype: np.dtype[Any]
    width: int
    """Values of a row."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize

    def array(self, site: str, layer: int) -> str:
        """Path of the array inside the store."""
        return f"{self.folder}/{site}/{layer}"


@dataclass(frozen=True, eq=False)
class SiteCalibration:
    """Means and scales of a site's channels for int8, fixed before the first row is stored."""

    mean: npt.NDArray[np.float32]
    """(L, D)"""
    scale: npt.NDArray[np.float32]
    """(L, D), above 0."""


def check_encoding(encoding: str) -> Encoding:
    """Return `encoding` if it is one of the four.

    Raises:
        InputError: naming those that exist.
    """
    if encoding not in STORED_DTYPE:
        raise InputError(f"encoding {encoding!r} is not one of {', '.join(STORED_DTYPE)}")
    return cast("Encoding", encoding)


def num_blocks(d_model: int) -> int:
    """Blocks into which a row's channels are cut."""
    return -(-d_model // BLOCK_CHANNELS)


def parts_of(encoding: Encoding, d_model: int) -> tuple[Part, ...]:
    """The arrays of a site and layer, the activations first."""
    values = Part(ACTIVATIONS, STORED_DTYPE[encoding], d_model)
    if encoding != "int8":
        return (values,)
    return values, Part(BLOCK_EXPONENTS, np.dtype("i1"), num_blocks(d_model))


class SiteCodec:
    """From floats to stored values of one site and back. Threads may share it.

    Args:
        encoding: encoding of the store.
        d_model: channels.
        calibration: calibration of the site; for int8 alone.
    """

    def __init__(
        self, encoding: Encoding, d_model: int, calibration: SiteCalibration | None = None
    ) -> None:
        self.encoding = encoding
        self.parts = parts_of(encoding, d_model)
        self._calibration = calibration

    def encode(self, values: Array, layer_index: int) -> Stored:
        """Floats → stored values, rounding to nearest, ties to even.

        Args:
            values: (N, D) float16, float32 or float64. An array that already has the stored data
                type of a float encoding (uint16 bit patterns for bfloat16) is taken as it is.
            layer_index: place of the layer among the store's.

        Raises:
            ActivationError: the data type is no float.
            NotFiniteError: int8 cannot hold a value that is not finite.
        """
        if self._calibration is None:
            return (encode(values, self.encoding),)
        if values.dtype.kind != "f":
            raise ActivationError(
                f"activations for encoding int8 must be floats, or pairs of int8 values and their "
                f"exponents, got {values.dtype.name}"
            )
        mean_D = self._calibration.mean[layer_index]
        scale_D = self._calibration.scale[layer_index]
        return encode_int8(values, mean_D, scale_D)

    def decode(self, parts: Stored, layer_index: int) -> npt.NDArray[np.float32]:
        """Stored values → (N, D) float32; exact for every encoding but int8's last rounding."""
        if self._calibration is None:
            return decode(parts[0], self.encoding)
        out = np.empty(parts[0].shape, np.float32)
        self.decode_finite_into(parts, layer_index, out)
        return out

    def decode_finite_into(self, parts: Stored, layer_index: int, out: Array) -> None:
        """Stored values → float32 or float64 in `out`, (N, D), without a copy.

        Faster than `decode` by a factor, but of float16 infinity and NaN make finite values over
        65,504, the largest float16.
        """
        if self._calibration is None:
            _decode_finite_into(parts[0], self.encoding, out)
            return
        quanta_ND, exponents_NB = parts
        decode_int8_into(
            quanta_ND,
            POWERS[exponents_NB.astype(np.int16) - MIN_EXPONENT],
            self._calibration.scale[layer_index],
            self._calibration.mean[layer_index],
            out,
        )


def encode(values: Array, encoding: Encoding) -> Array:
    """Floats → values of a float encoding, rounding to nearest, ties to even; any shape.

    Raises:
        ActivationError: the data type is no float.
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


def encode_int8(values: Array, mean_D: Array, scale_D: Array) -> Stored:
    """Floats → (N, D) int8 quanta and (N, B) int8 exponents.

    x ≈ q · 2^(k/8) · scale + mean: k is the least exponent with which no quantum of its block
    passes 127.

    Raises:
        NotFiniteError: a value is not finite.
    """
    num_rows, d_model = values.shape
    y_NBC = np.zeros((num_rows, num_blocks(d_model), BLOCK_CHANNELS), np.float32)
    quanta_ND = np.empty((num_rows, d_model), np.int8)
    with np.errstate(over="ignore", invalid="ignore"):
        place_NB, largest_NB = encode_int8_into(
            np, values, mean_D, scale_D, POWERS, _places, y_NBC, quanta_ND
        )
    if not np.isfinite(largest_NB).all():
        raise NotFiniteError
    return quanta_ND, (place_NB + MIN_EXPONENT).astype(np.int8)


def _places(largest_NB: Array) -> Array:
    least = np.float32(2.0 ** (MIN_EXPONENT / EIGHTHS))
    wanted_NB = np.ceil(EIGHTHS * np.log2(np.maximum(largest_NB / np.float32(MAX_QUANTUM), least)))
    exponents_NB = np.clip(wanted_NB, MIN_EXPONENT, MAX_EXPONENT).astype(np.int16)
    place_NB: Array = exponents_NB - MIN_EXPONENT
    return place_NB


def encode_int8_into(
    xp: Any,
    x_ND: Any,
    mean_D: Any,
    scale_D: Any,
    powers_K: Any,
    places: Callable[[Any], Any],
    y_NBC: Any,
    quanta_ND: Any,
) -> tuple[Any, Any]:
    """q = round((x − mean) / scale / 2^(k/8)), with one k for each block.

    Args:
        xp: numpy or torch, whose arrays are given.
        x_ND: floats.
        mean_D: channel means.
        scale_D: channel scales.
        powers_K: `POWERS`.
        places: (N, B) largest magnitudes of the blocks → place in `powers_K` of the least exponent
            with which no quantum passes 127.
        y_NBC: float32 to be written over, C channels of a block; 0 past the last channel.
        quanta_ND: int8 to be written over.

    Returns:
        (N, B) places, and the largest |x − mean| / scale of each block; not finite where a value
        is not.
    """
    y_ND = y_NBC.reshape(len(y_NBC), -1)[:, : x_ND.shape[1]]
    xp.subtract(x_ND, mean_D, out=y_ND)
    y_ND /= scale_D
    largest_NB = xp.maximum(xp.amax(y_NBC, 2), -xp.amin(y_NBC, 2))
    place_NB = places(largest_NB)
    y_NBC /= powers_K[place_NB][:, :, None]
    xp.round(y_ND, out=y_ND)
    quanta_ND[...] = xp.clip(y_ND, -MAX_QUANTUM, MAX_QUANTUM, out=y_ND)
    return place_NB, largest_NB


def decode_int8_into(quanta_ND: Any, factors_NB: Any, scale: Any, mean: Any, out_ND: Any) -> None:
    """x = q · 2^(k/8) · scale + mean, in `out_ND`.

    Operators alone, so that arrays of numpy and tensors of torch, on one device, may be given.

    Args:
        quanta_ND: q, int8.
        factors_NB: 2^(k/8) of each block, from `POWERS`.
        scale: channel scales, (D,), or (N, D) where each row has its own.
        mean: channel means, likewise.
        out_ND: floats to be written over, the channels of a row contiguous.
    """
    out_ND[...] = quanta_ND
    whole = quanta_ND.shape[1] // BLOCK_CHANNELS
    end = whole * BLOCK_CHANNELS
    blocks_NBC = out_ND[:, :end].reshape(len(out_ND), whole, BLOCK_CHANNELS)
    blocks_NBC *= factors_NB[:, :whole, None]
    if end < quanta_ND.shape[1]:
        out_ND[:, end:] *= factors_NB[:, whole:]
    # Two steps: one fused step would round differently.
    out_ND *= scale
    out_ND += mean


def decode(stored: Array, encoding: Encoding) -> npt.NDArray[np.float32]:
    """Values in a float encoding → float32, same shape; exact."""
    if encoding == "bfloat16":
        return (stored.astype("<u4") << 16).view("<f4")
    return stored.astype("<f4", copy=False)


def _decode_finite_into(stored: Array, encoding: Encoding, out: Array) -> None:
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
