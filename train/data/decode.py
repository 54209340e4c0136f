"""From rows as a store holds them to floats, on the device that trains: bytes are few on the way.

Shape suffixes: N rows, D channels, B blocks of channels, L layers.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.store import AnyStore
from mlsae.store.format.encoding import MIN_EXPONENT, POWERS, decode_int8_into

StoredParts = tuple[torch.Tensor, ...]
"""Rows as stored: (N, width) for each array that holds them."""


class RowDecoder:
    """Makes floats from the stored rows at some layers.

    Args:
        store: store with the rows.
        site: a site in the store.
        layers: the store's layers, in the run's order.
        device: device that decodes.
    """

    def __init__(
        self, store: AnyStore, site: str, layers: tuple[int, ...], device: torch.device
    ) -> None:
        self._device, self._num_layers = device, len(layers)
        self._is_scaled = store.encoding == "int8"
        if self._is_scaled:
            at = [store.layers.index(layer) for layer in layers]
            of_stores = [c.sites[site] for c in store.calibrations if c is not None]
            # One line for each layer in each store.
            means = np.concatenate([of_store.mean[at] for of_store in of_stores])
            scales = np.concatenate([of_store.scale[at] for of_store in of_stores])
            self._means = torch.from_numpy(means).to(device)
            self._scales = torch.from_numpy(scales).to(device)
            self._powers = torch.from_numpy(POWERS).to(device)

    def __call__(
        self, parts: StoredParts, layer: torch.Tensor | int, origin: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decode rows.

        Args:
            parts: as stored, on any device.
            layer: index into the layers: (N,) for each row, or one for them all.
            origin: (N,) each row's index into the store's `stores`; None for the first.

        Returns:
            (N, D) on the device: float32 for int8; else in the store's own floating type, which the
            SAE widens.
        """
        values_ND, *exponents = (part.to(self._device) for part in parts)
        if not self._is_scaled:
            return values_ND
        factors_NB = self._powers[exponents[0].int() - MIN_EXPONENT]
        line = layer.to(self._device) if isinstance(layer, torch.Tensor) else layer
        if origin is not None:
            line = line + self._num_layers * origin.to(self._device)
        x_ND = torch.empty(values_ND.shape, device=self._device)
        decode_int8_into(values_ND, factors_NB, self._scales[line], self._means[line], x_ND)
        return x_ND


def origin_of(store: AnyStore, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """(n,) each row's index into the store's `stores`; None where decoding does not ask."""
    if store.encoding != "int8" or len(store.stores) == 1:
        return None
    return store.row_origin(rows)


def torch_rows(rows: npt.NDArray[Any], encoding: str) -> torch.Tensor:
    """Stored rows as a tensor on the same memory: bfloat16 where they are its bits."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if encoding == "bfloat16" else tensor
