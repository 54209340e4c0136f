"""One batch through the transformer, as the bytes that the store will hold.

B = sequences, T = positions of a sequence, d = d_model, N = rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.base.errors import InputError, ResourceError
from mlsae.harvest.batches import Batch
from mlsae.harvest.device_moments import DeviceMoments
from mlsae.models import Transformer
from mlsae.models.capture import capture
from mlsae.store import ActivationError

Key = tuple[str, int]

FLOAT16_AUTO_LIMIT = 16_000.0
BUFFERS = {"cpu": 2, "cuda": 3}
"""Sets of host buffers: two that the writer holds, and on a GPU a batch on its way."""
_STORED = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Computed:
    """A batch whose values may still be on their way to the host."""

    _values: dict[Key, torch.Tensor]
    _largest: dict[Key, torch.Tensor]
    _arrived: Sequence[torch.cuda.Event]

    def activations(self) -> dict[Key, npt.NDArray[Any]]:
        """(site, layer) → (N, d) float16, float32, or uint16 bit patterns of bfloat16.

        Raises:
            ActivationError: a value is not finite, where moments were summed on the device.
        """
        for event in self._arrived:
            event.synchronize()
        for (site, layer), largest in self._largest.items():
            if not torch.isfinite(largest):
                values = self._values[site, layer].float().abs()
                finite = values[values.isfinite()]
                raise ActivationError(
                    f"layer {layer} ({site}): a value is not finite in the stored data type; the "
                    f"largest finite magnitude of that batch is "
                    f"{float(finite.max()) if finite.numel() else 0.0:.5g}; use --encoding "
                    "bfloat16 for values over 65,504, or another --model-dtype"
                )
        return {key: _as_numpy(values) for key, values in self._values.items()}


class Forward:
    """Runs batches; cast, moments and encoding happen where the activations are.

    On CUDA the values go to pinned host memory while the next batch is computed.
    """

    def __init__(
        self,
        transformer: Transformer,
        *,
        layers: Sequence[int],
        sites: Sequence[str],
        encoding: str,
        batch_rows: int,
    ) -> None:
        """Set up the buffers of batches of up to `batch_rows` stored rows."""
        self._transformer = transformer
        self._layers, self._sites = tuple(layers), tuple(sites)
        self._stored = _STORED[encoding]
        self.is_asynchronous = transformer.device.type == "cuda"
        self.moments = (
            DeviceMoments(sites, layers, transformer.d_model) if self.is_asynchronous else None
        )
        """Sums on the device; None on the CPU, where the writer's threads make them."""
        shape = (batch_rows, transformer.d_model)
        self._buffers: Iterator[dict[Key, torch.Tensor]] = cycle(
            {
                (site, layer): torch.empty(
                    shape, dtype=self._stored, pin_memory=self.is_asynchronous
                )
                for site in self._sites
                for layer in self._layers
            }
            for _ in range(BUFFERS["cuda" if self.is_asynchronous else "cpu"])
        )

    def __call__(self, batch: Batch, group_N: npt.NDArray[np.int8] | None = None) -> Computed:
        """Compute a batch; on CUDA, without waiting for it.

        Args:
            batch: the sequences.
            group_N: moments' group of each stored row; needed where `moments` is not None.

        Raises:
            ResourceError: the device has too little memory for such a batch.
        """
        num_rows = len(batch.rows)
        buffers = {key: values[:num_rows] for key, values in next(self._buffers).items()}
        with memory_explained(batch.inputs.tokens.shape[0]), torch.inference_mode():
            captured = capture(self._transformer, batch.inputs, self._layers, self._sites)
            kept = {key: _rows(x_BTd, batch.rows) for key, x_BTd in captured.items()}
            largest: dict[Key, torch.Tensor] = {}
            if self.moments is not None and group_N is not None:
                kept = {key: x_Nd.to(self._stored) for key, x_Nd in kept.items()}
                largest = self.moments.add(group_N, kept)
                largest = {
                    key: value.to("cpu", non_blocking=True) for key, value in largest.items()
                }
            for key, x_Nd in kept.items():
                buffers[key].copy_(x_Nd, non_blocking=self.is_asynchronous)
            arrived = [
                torch.cuda.current_stream(device).record_event()
                for device in {x_Nd.device for x_Nd in kept.values()}
                if device.type == "cuda"
            ]
        return Computed(buffers, largest, arrived)


def preflight(
    transformer: Transformer, batch: Batch, layers: Sequence[int], sites: Sequence[str]
) -> dict[Key, float]:
    """The largest magnitude of each site and layer in one batch, before anything is written.

    Raises:
        ActivationError: a value is not finite; names the layer and the largest finite magnitude.
        ResourceError: the device has too little memory for such a batch.
    """
    with memory_explained(batch.inputs.tokens.shape[0]), torch.inference_mode():
        captured = capture(transformer, batch.inputs, layers, sites)
        largest = {}
        for (site, layer), x_BTd in captured.items():
            magnitudes = _rows(x_BTd, batch.rows).abs().float()
            finite = magnitudes[magnitudes.isfinite()]
            largest[site, layer] = float(finite.max()) if finite.numel() else 0.0
            if finite.numel() < magnitudes.numel():
                raise ActivationError(
                    f"layer {layer} ({site}) gives values that are not finite in the first "
                    f"batch; its largest finite magnitude is {largest[site, layer]:.5g}; try "
                    "another --model-dtype"
                )
    return largest


def choose_encoding(asked: str, dtype: torch.dtype, largest: Mapping[Key, float]) -> str:
    """Resolve `--encoding auto`: bfloat16 for a model in bfloat16, else float16.

    Raises:
        InputError: float16 would be chosen for magnitudes over 16,000.
    """
    if asked != "auto":
        return asked
    if dtype == torch.bfloat16:
        return "bfloat16"
    site, layer = max(largest, key=lambda name: largest[name])
    if largest[site, layer] > FLOAT16_AUTO_LIMIT:
        raise InputError(
            f"layer {layer} ({site}) reaches {largest[site, layer]:,.0f} in the first batch, over "
            f"the {FLOAT16_AUTO_LIMIT:,.0f} up to which float16 is chosen by itself; use "
            "--encoding bfloat16 (as many bytes) or --encoding float32"
        )
    return "float16"


def _rows(x_BTd: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
    flat = x_BTd.reshape(-1, x_BTd.shape[-1])
    if np.array_equal(rows[[0, -1]], [0, len(rows) - 1]):
        return flat[: len(rows)]
    return flat.index_select(0, torch.from_numpy(rows).to(flat.device))


def _as_numpy(values: torch.Tensor) -> npt.NDArray[Any]:
    if values.dtype == torch.bfloat16:
        return values.view(torch.uint16).numpy()
    return values.numpy()


@contextmanager
def memory_explained(num_sequences: int) -> Iterator[None]:
    """Running out of memory in a forward pass, in one line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU's allocator raises a plain RuntimeError.
        if type(error) is RuntimeError and "allocate memory" not in str(error):
            raise
        if isinstance(error, ResourceError):
            raise
        raise ResourceError(
            f"out of memory in a forward pass of {num_sequences} sequences; use a smaller "
            "--batch-size (it belongs to the plan, so begin again in an empty --out)"
        ) from error
