"""From activations to stored values and back, where the transformer computed them.

Stored values are those that `mlsae.store` would make of the same floats on the host.

Shape suffixes: N rows, D channels, B blocks of channels, C channels of a block, K exponents.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.base.words import Key
from mlsae.store import Calibration, Encoding
from mlsae.store.format.encoding import (
    BLOCK_CHANNELS,
    MAX_QUANTUM,
    MIN_EXPONENT,
    POWERS,
    decode_int8_into,
    encode_int8_into,
    num_blocks,
)

StoredTensors = tuple[Tensor, ...]
"""Stored values of some rows on a device: a tensor for each array of the store, (N, width)."""
PartTypes = tuple[tuple[torch.dtype, int], ...]
"""Data type and width of each array."""

PIECE_VALUES = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Values that are encoded or measured at once: on the CPU a table of them stays in its caches."""
UNSOUND = -128
"""First value of a block that int8 cannot hold; no quantum, for those are -127 to 127."""
_FLOATS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


class Encoded(NamedTuple):
    """Rows as they will be stored."""

    parts: StoredTensors
    largest: Tensor | None
    """Scalar, not finite where a value cannot be held; None where stored values show that
    themselves."""


class Codec(Protocol):
    """Conversion of rows of one site and layer to stored values and back."""

    encoding: Encoding
    parts: PartTypes
    measures_all: bool
    """True where the cost of the encoding depends on the rows, so that a few do not tell."""

    def encode(self, x_ND: Tensor) -> Encoded:
        """Floats of any precision → stored values on the same device."""
        ...

    def decode_into(self, parts: StoredTensors, out_ND: Tensor) -> None:
        """Stored values → float32 in `out_ND`."""
        ...

    def sound(self, parts: StoredTensors) -> tuple[Tensor, Tensor]:
        """(N, D) decoded values, and a mask of those that could be encoded."""
        ...


Codecs = Mapping[Key, Codec]


class FloatCodec:
    """float16, bfloat16 or float32: a cast."""

    measures_all = False

    def __init__(self, encoding: Encoding, d_model: int) -> None:
        self.encoding = encoding
        self._dtype = _FLOATS[encoding]
        self.parts: PartTypes = ((self._dtype, d_model),)

    def encode(self, x_ND: Tensor) -> Encoded:
        """Floats of any precision → stored values on the same device."""
        return Encoded((x_ND.to(self._dtype),), None)

    def decode_into(self, parts: StoredTensors, out_ND: Tensor) -> None:
        """Stored values → float32 in `out_ND`."""
        out_ND.copy_(parts[0])

    def sound(self, parts: StoredTensors) -> tuple[Tensor, Tensor]:
        """(N, D) decoded values, and a mask of those that could be encoded."""
        return parts[0].float(), parts[0].isfinite()


class Int8Codec:
    """int8 with an exponent a block, as `mlsae.store.format.encoding.encode_int8`.

    A block's exponent is looked up in a table of the magnitudes that each can hold, where the host
    takes a logarithm, so that every device finds the same exponent.

    Args:
        mean_D: channel means of the store's calibration, float32.
        scale_D: channel scales.
        scratch: memory that the codecs of a store share.
    """

    encoding: Encoding = "int8"
    measures_all = True

    def __init__(
        self,
        mean_D: npt.NDArray[np.float32],
        scale_D: npt.NDArray[np.float32],
        scratch: "Scratch",
    ) -> None:
        self._channels_2D = torch.from_numpy(np.stack([mean_D, scale_D]))
        self._d_model, self._num_blocks = len(mean_D), num_blocks(len(mean_D))
        self._scratch = scratch
        self.parts: PartTypes = ((torch.int8, self._d_model), (torch.int8, self._num_blocks))

    def encode(self, x_ND: Tensor) -> Encoded:
        """Floats of any precision → stored values on the same device.

        A block with a value that is not finite begins with `UNSOUND`.
        """
        device, num_rows = x_ND.device, len(x_ND)
        quanta_ND = torch.empty((num_rows, self._d_model), dtype=torch.int8, device=device)
        exponents_NB = torch.empty((num_rows, self._num_blocks), dtype=torch.int8, device=device)
        largest = torch.zeros((), device=device)
        most_rows = piece_rows(device, self._num_blocks * BLOCK_CHANNELS)
        for start in range(0, num_rows, most_rows):
            piece = slice(start, start + most_rows)
            found = self._encode_piece(x_ND[piece], quanta_ND[piece], exponents_NB[piece])
            largest = torch.maximum(largest, found)
        return Encoded((quanta_ND, exponents_NB), largest)

    def decode_into(self, parts: StoredTensors, out_ND: Tensor) -> None:
        """Stored values → float32 in `out_ND`."""
        quanta_ND, exponents_NB = parts
        mean_D, scale_D = self._channels_on(out_ND.device)
        factors_NB = self._scratch.powers(out_ND.device)[exponents_NB.long() - MIN_EXPONENT]
        decode_int8_into(quanta_ND, factors_NB, scale_D, mean_D, out_ND)

    def sound(self, parts: StoredTensors) -> tuple[Tensor, Tensor]:
        """(N, D) decoded values, and a mask of those that could be encoded."""
        x_ND = torch.empty(parts[0].shape, device=parts[0].device)
        self.decode_into(parts, x_ND)
        is_sound_NB = parts[0][:, ::BLOCK_CHANNELS] != UNSOUND
        is_sound_ND = is_sound_NB.repeat_interleave(BLOCK_CHANNELS, dim=1)[:, : self._d_model]
        return x_ND, is_sound_ND

    def _encode_piece(self, x_ND: Tensor, quanta_ND: Tensor, exponents_NB: Tensor) -> Tensor:
        """Largest |x − mean| / scale; not finite where a value is not."""
        mean_D, scale_D = self._channels_on(x_ND.device)
        y_NBC = self._scratch.table(x_ND.device, len(x_ND), self._num_blocks)
        powers_K = self._scratch.powers(x_ND.device)

        def places(largest_NB: Tensor) -> Tensor:
            # Not a logarithm: a float32 one is off by some last bits, differently by device.
            place_NB = torch.bucketize(largest_NB, powers_K * MAX_QUANTUM)
            return place_NB.clamp_(max=len(powers_K) - 1)

        place_NB, largest_NB = encode_int8_into(
            torch, x_ND, mean_D, scale_D, powers_K, places, y_NBC, quanta_ND
        )
        exponents_NB.copy_(place_NB + MIN_EXPONENT)
        quanta_ND[:, ::BLOCK_CHANNELS].masked_fill_(~largest_NB.isfinite(), UNSOUND)
        largest: Tensor = largest_NB.max()
        return largest

    def _channels_on(self, device: torch.device) -> Tensor:
        """(2, D) means and scales; a layer is always on one device."""
        self._channels_2D = self._channels_2D.to(device)
        return self._channels_2D


class Scratch:
    """Constants and memory that the int8 codecs of a store share on each device."""

    def __init__(self) -> None:
        self._powers: dict[torch.device, Tensor] = {}
        self._tables: dict[torch.device, Tensor] = {}

    def powers(self, device: torch.device) -> Tensor:
        """(K,) 2^(k / 8) for every exponent, ascending; float32."""
        if device not in self._powers:
            self._powers[device] = torch.from_numpy(POWERS).to(device)
        return self._powers[device]

    def table(self, device: torch.device, num_rows: int, blocks: int) -> Tensor:
        """(N, B, C) float32 to be written over, but for channels past the last, which stay 0."""
        if device not in self._tables or len(self._tables[device]) < num_rows:
            shape = (num_rows, blocks, BLOCK_CHANNELS)
            self._tables[device] = torch.zeros(shape, device=device)
        return self._tables[device][:num_rows]


def codecs_for(
    encoding: Encoding,
    sites: Sequence[str],
    layers: Sequence[int],
    d_model: int,
    calibration: Calibration | None,
) -> dict[Key, Codec]:
    """Codecs of a store, by site and layer; `calibration` is for int8 alone."""
    keys = [(site, layer) for site in sites for layer in layers]
    if calibration is None:
        return {key: FloatCodec(encoding, d_model) for key in keys}
    scratch = Scratch()
    channels = {
        (site, layer): (of_site.mean[place], of_site.scale[place])
        for site, of_site in calibration.sites.items()
        for place, layer in enumerate(layers)
    }
    return {key: Int8Codec(*channels[key], scratch) for key in keys}


def piece_rows(device: torch.device, row_values: int) -> int:
    """Rows that are encoded or measured at once."""
    return max(1, PIECE_VALUES.get(device.type, PIECE_VALUES["cpu"]) // row_values)
