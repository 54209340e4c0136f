"""One batch through the transformer, as the bytes that the store will hold.

B = sequences, T = positions of a sequence, d = d_model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.base.errors import InputError, ResourceError
from mlsae.models import Transformer
from mlsae.models.capture import capture
from mlsae.store import ActivationError

FLOAT16_AUTO_LIMIT = 16_000.0
_STORED = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


def stored_activations(
    transformer: Transformer,
    tokens_BT: npt.NDArray[np.uint32],
    layers: Sequence[int],
    encoding: str,
    batch_sequences: int,
) -> dict[int, npt.NDArray[Any]]:
    """`resid_post` of some sequences in the stored data type, cast on the device.

    The forward pass always has `batch_sequences` sequences, because its shape decides bits; the
    rows that fill up a short batch are dropped.

    Returns:
        For each layer an array (B · T, d): float16, float32, or uint16 bit patterns of bfloat16.

    Raises:
        ResourceError: the device has too little memory for such a batch.
    """
    with _batch_size_explained(batch_sequences), torch.inference_mode():
        captured = capture(transformer, _filled(tokens_BT, batch_sequences), layers)
        encoded = {
            layer: _rows(x_BTd, len(tokens_BT)).to(_STORED[encoding]).cpu()
            for layer, x_BTd in captured.items()
        }
    return {layer: _as_numpy(values) for layer, values in encoded.items()}


def preflight(
    transformer: Transformer,
    tokens_BT: npt.NDArray[np.uint32],
    layers: Sequence[int],
    batch_sequences: int,
) -> dict[int, float]:
    """The largest magnitude of each layer in one batch, before anything is written.

    Raises:
        ActivationError: a value is not finite; names the layer and the largest finite magnitude.
        ResourceError: the device has too little memory for such a batch.
    """
    with _batch_size_explained(batch_sequences), torch.inference_mode():
        captured = capture(transformer, _filled(tokens_BT, batch_sequences), layers)
        largest = {}
        for layer, x_BTd in captured.items():
            magnitudes = _rows(x_BTd, len(tokens_BT)).abs().float()
            finite = magnitudes[magnitudes.isfinite()]
            largest[layer] = float(finite.max()) if finite.numel() else 0.0
            if finite.numel() < magnitudes.numel():
                raise ActivationError(
                    f"layer {layer} (resid_post) gives values that are not finite in the first "
                    f"batch; its largest finite magnitude is {largest[layer]:.5g}; try another "
                    "--model-dtype"
                )
    return largest


def choose_encoding(asked: str, dtype: torch.dtype, largest: dict[int, float]) -> str:
    """Resolve `--encoding auto`: bfloat16 for a model in bfloat16, else float16.

    Raises:
        InputError: float16 would be chosen for magnitudes over 16,000.
    """
    if asked != "auto":
        return asked
    if dtype == torch.bfloat16:
        return "bfloat16"
    layer = max(largest, key=lambda name: largest[name])
    if largest[layer] > FLOAT16_AUTO_LIMIT:
        raise InputError(
            f"layer {layer} reaches {largest[layer]:,.0f} in the first batch, over the "
            f"{FLOAT16_AUTO_LIMIT:,.0f} up to which float16 is chosen by itself; use --encoding "
            "bfloat16 (as many bytes) or --encoding float32"
        )
    return "float16"


def _filled(tokens_BT: npt.NDArray[np.uint32], batch_sequences: int) -> torch.Tensor:
    missing = batch_sequences - len(tokens_BT)
    return torch.from_numpy(np.pad(tokens_BT.astype(np.int64), ((0, missing), (0, 0))))


def _rows(x_BTd: torch.Tensor, num_sequences: int) -> torch.Tensor:
    return x_BTd[:num_sequences].reshape(-1, x_BTd.shape[-1])


def _as_numpy(values: torch.Tensor) -> npt.NDArray[Any]:
    if values.dtype == torch.bfloat16:
        return values.view(torch.uint16).numpy()
    return values.numpy()


@contextmanager
def _batch_size_explained(batch_sequences: int) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU's allocator raises a plain RuntimeError.
        if type(error) is RuntimeError and "allocate memory" not in str(error):
            raise
        if isinstance(error, ResourceError):
            raise
        raise ResourceError(
            f"out of memory in a forward pass of {batch_sequences} sequences; use a smaller "
            "--batch-size (it belongs to the plan, so begin again in an empty --out)"
        ) from error
