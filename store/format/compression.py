"""Compressed chunks: Zarr's `blosc` codec with zstd, as storage_schema.md fixes it.

numcodecs does the work, as it does for zarr-python, in the calling thread alone: with threads of
its own it would order a chunk's blocks by chance, and a store's bytes would differ between runs.
"""

import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numcodecs import blosc
from zarr.codecs import BloscCodec

from mlsae.base.errors import InputError

COMPRESSIONS = ("none", "zstd")
LEVEL = 3
_BLOSC_HEADER = struct.Struct("<4B3I")
_OVERHEAD = 16
_SHUFFLES = {"noshuffle": 0, "bitshuffle": 2}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Compression of activation chunks."""

    name: str
    """One of COMPRESSIONS but none."""
    level: int
    """Level of zstd."""


def compression_named(name: str) -> Compression | None:
    """The compression of a name; None for `none`.

    Raises:
        InputError: there is no such compression.
    """
    if name not in COMPRESSIONS:
        raise InputError(f"compression {name!r} is not one of {', '.join(COMPRESSIONS)}")
    return None if name == "none" else Compression(name=name, level=LEVEL)


class Compressor:
    """Compresses and decompresses the chunks of one array.

    Args:
        compression: compression of the plan.
        dtype: stored data type. Values of several bytes are shuffled bit by bit, so that sign and
            exponent bits of many lie together; single bytes are left as they are.
    """

    def __init__(self, compression: Compression, dtype: np.dtype[Any]) -> None:
        self._level = compression.level
        self._typesize = dtype.itemsize
        self._shuffle: Literal["noshuffle", "bitshuffle"] = (
            "noshuffle" if dtype.itemsize == 1 else "bitshuffle"
        )

    def compress(self, chunk: Bytes) -> Bytes:
        """The bytes of a chunk → the bytes that are stored, without the checksum."""
        packed = blosc.compress(
            chunk, b"zstd", self._level, _SHUFFLES[self._shuffle], 0, self._typesize
        )
        return np.frombuffer(packed, np.uint8)

    def decompress(self, packed: Bytes, out: Bytes) -> bool:
        """Fill `out` with a chunk's bytes; False if they are not exactly so many.

        The number is read before anything is decompressed, so memory cannot be taken by a lie.
        """
        if len(packed) < _BLOSC_HEADER.size:
            return False
        num_bytes, _, num_packed = _BLOSC_HEADER.unpack_from(packed.data)[4:]
        if num_bytes != len(out) or num_packed != len(packed):
            return False
        try:
            blosc.decompress(packed, out)
        except (RuntimeError, ValueError):
            return False
        return True

    def codec(self) -> BloscCodec:
        """The codec as the array's metadata names it."""
        return BloscCodec(
            typesize=self._typesize,
            cname="zstd",
            clevel=self._level,
            shuffle=self._shuffle,
            blocksize=0,
        )

    @staticmethod
    def most_bytes(chunk_bytes: int) -> int:
        """Most bytes that a chunk can take."""
        return chunk_bytes + _OVERHEAD


def compressor_of(compression: Compression | None, dtype: np.dtype[Any]) -> Compressor | None:
    """The compressor of an array; None where chunks lie as they are."""
    return None if compression is None else Compressor(compression, dtype)
