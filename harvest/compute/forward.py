"""One batch through the transformer, as the bytes that the store will hold.

B = sequences, T = positions of a sequence, d = d_model, N = rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.base.errors import InputError, ResourceError
from mlsae.base.units import counted
from mlsae.base.words import Key
from mlsae.harvest.compute.added_fvu import RunningFVU
from mlsae.harvest.compute.batches import TextBatch
from mlsae.harvest.compute.codecs import Codecs, Encoded, StoredTensors
from mlsae.harvest.compute.moments import RunningMoments, each_alone
from mlsae.models import Transformer
from mlsae.models.capture import capture
from mlsae.store import ActivationError
from mlsae.store.format.presets import Preset, resolve_preset

FLOAT16_AUTO_LIMIT = 16_000.0
BFLOAT16_ADVICE = "--encoding bfloat16 for values over 65,504, or "
PINNED = 3
"""Sets of pinned buffers: two that the writer holds, and a batch on its way."""


@dataclass(kw_only=True)
class Computed:
    """A batch whose values may still be on their way to the host."""

    rows: Mapping[Key, torch.Tensor]
    """Activations on the device that computed them; dropped once they are measured."""
    encoded: Mapping[Key, Encoded]
    """Stored values on that device; dropped likewise."""
    values: Mapping[Key, StoredTensors]
    """Stored values on the host, or on their way there."""
    largest: Mapping[Key, torch.Tensor]
    """Largest magnitudes, once measured; not finite where a value is not."""
    first_row: int
    arrived: list[torch.cuda.Event]
    codecs: Codecs

    def stored(self) -> dict[Key, tuple[npt.NDArray[Any], ...]]:
        """(site, layer) → stored values: an array for each part of a row, (N, width)."""
        for event in self.arrived:
            event.synchronize()
        return {key: tuple(_as_numpy(part) for part in parts) for key, parts in self.values.items()}

    def check(self) -> None:
        """Refuse measured values that cannot be stored.

        Raises:
            ActivationError: a value is not finite.
        """
        for event in self.arrived:
            event.synchronize()
        for key, largest in self.largest.items():
            if not torch.isfinite(largest):
                raise ActivationError(self._explanation(key))

    def _explanation(self, key: Key) -> str:
        codec = self.codecs[key]
        values, is_sound = codec.sound(self.values[key])
        row = self.first_row + int((~is_sound.all(dim=1)).nonzero()[0])
        largest = float(values[is_sound].abs().max()) if bool(is_sound.any()) else 0.0
        advice = "" if codec.encoding == "int8" else BFLOAT16_ADVICE
        return (
            f"layer {key[1]} ({key[0]}), row {row}: a value is not finite as "
            f"{codec.encoding}; the largest finite magnitude of that batch is {largest:.5g}; "
            f"use {advice}another --model-dtype"
        )


class Forward:
    """Runs batches; encoding, its cost and moments are computed where the activations are.

    On CUDA the values go to pinned host memory while the next batch is computed.
    """

    def __init__(
        self,
        transformer: Transformer,
        *,
        layers: Sequence[int],
        sites: Sequence[str],
        codecs: Codecs,
        batch_rows: int,
    ) -> None:
        """Get ready for batches of up to `batch_rows` stored rows."""
        self._transformer = transformer
        self._layers, self._sites = tuple(layers), tuple(sites)
        self._codecs = codecs
        self.is_asynchronous = transformer.device.type == "cuda"
        """True where a call returns before its values are there."""
        self.is_on_host = transformer.device.type == "cpu"
        """True where a call and the writer's threads want the same cores."""
        num_threads = torch.get_num_threads() // 2 if self.is_on_host else None
        self.moments = RunningMoments(codecs, sites, layers, transformer.d_model, num_threads)
        """Moments of all rows since they were last taken."""
        self.cost = RunningFVU(codecs, transformer.d_model)
        """Added FVU of those rows."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pinned = cycle(
            {
                (site, layer): tuple(
                    torch.empty((batch_rows, width), dtype=dtype, pin_memory=True)
                    for dtype, width in codecs[site, layer].parts
                )
                for site in self._sites
                for layer in self._layers
            }
            for _ in range(PINNED if self.is_asynchronous else 0)
        )

    def __call__(self, batch: TextBatch) -> Computed:
        """Compute and encode a batch; on CUDA, without waiting for it.

        Raises:
            ResourceError: the device has too little memory for such a batch.
        """
        with memory_explained(batch.inputs.tokens.shape[0]), torch.inference_mode():
            captured = capture(self._transformer, batch.inputs, self._layers, self._sites)
            rows = {key: stored_rows(x_BTd, batch.rows) for key, x_BTd in captured.items()}
            encoded = {key: self._codecs[key].encode(x_Nd) for key, x_Nd in rows.items()}
            values = {key: found.parts for key, found in encoded.items()}
            arrived: list[torch.cuda.Event] = []
            if self.is_asynchronous:
                pinned = {
                    key: tuple(buffer[: len(batch.rows)] for buffer in buffers)
                    for key, buffers in next(self._pinned).items()
                }
                arrived = self._send(values, pinned)
                values = pinned
        return Computed(
            rows=rows,
            encoded=encoded,
            values=values,
            largest={},
            first_row=batch.first_row,
            arrived=arrived,
            codecs=self._codecs,
        )

    def measure(self, computed: Computed, group_N: npt.NDArray[np.int8]) -> None:
        """Add a batch to the moments and to the cost of the encoding.

        Args:
            computed: the batch.
            group_N: moments' group of each stored row.

        Raises:
            ResourceError: the device has too little memory for that.
        """
        with memory_explained(), torch.inference_mode():
            parts = {key: found.parts for key, found in computed.encoded.items()}
            with each_alone() if self.is_on_host else nullcontext():
                self.cost.add(group_N, computed.rows, parts)
            largest = self.moments.add(group_N, parts)
            for key, found in computed.encoded.items():
                largest[key] = largest[key] if found.largest is None else found.largest
            if self.is_asynchronous:
                devices = {value.device for value in largest.values()}
                largest = {
                    key: value.to("cpu", non_blocking=True) for key, value in largest.items()
                }
                computed.arrived += [
                    torch.cuda.current_stream(device).record_event()
                    for device in devices
                    if device.type == "cuda"
                ]
        computed.largest, computed.rows, computed.encoded = largest, {}, {}

    def _send(
        self, values: Mapping[Key, StoredTensors], pinned: Mapping[Key, StoredTensors]
    ) -> list[torch.cuda.Event]:
        """Begin copies, on streams beside those of the next forward pass."""
        events = []
        for device in {parts[0].device for parts in values.values()}:
            here = [
                pair
                for key, parts in values.items()
                if parts[0].device == device
                for pair in zip(pinned[key], parts, strict=True)
            ]
            if device.type != "cuda":
                for buffer, part in here:
                    buffer.copy_(part)
                continue
            computing = torch.cuda.current_stream(device)
            events.append(computing.record_event())
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            copying = self._streams[device]
            copying.wait_stream(computing)
            with torch.cuda.stream(copying):
                for buffer, part in here:
                    buffer.copy_(part, non_blocking=True)
                    # The allocator must not hand its memory out again before it is copied.
                    part.record_stream(copying)
                events.append(copying.record_event())
        return events


def preflight(
    transformer: Transformer, batch: TextBatch, layers: Sequence[int], sites: Sequence[str]
) -> dict[Key, float]:
    """Largest magnitude of each site and layer in one batch, before anything is written.

    Raises:
        ActivationError: a value is not finite; names the layer and the largest finite magnitude.
        ResourceError: the device has too little memory for such a batch.
    """
    with memory_explained(batch.inputs.tokens.shape[0]), torch.inference_mode():
        captured = capture(transformer, batch.inputs, layers, sites)
        largest = {}
        for (site, layer), x_BTd in captured.items():
            magnitudes = stored_rows(x_BTd, batch.rows).abs().float()
            finite = magnitudes[magnitudes.isfinite()]
            largest[site, layer] = float(finite.max()) if finite.numel() else 0.0
            if finite.numel() < magnitudes.numel():
                raise ActivationError(
                    f"layer {layer} ({site}) gives values that are not finite in the first "
                    f"batch; its largest finite magnitude is {largest[site, layer]:.5g}; try "
                    "another --model-dtype"
                )
    return largest


def choose_encoding(asked: str, dtype: torch.dtype, largest: Mapping[Key, float]) -> Preset:
    """Resolve `--encoding`; `auto` is bfloat16 for a model in bfloat16, else float16.

    Raises:
        InputError: float16 would be chosen for magnitudes over 16,000.
    """
    if asked != "auto":
        return resolve_preset(asked)
    if dtype == torch.bfloat16:
        return resolve_preset("bfloat16")
    site, layer = max(largest, key=lambda name: largest[name])
    if largest[site, layer] > FLOAT16_AUTO_LIMIT:
        raise InputError(
            f"layer {layer} ({site}) reaches {largest[site, layer]:,.0f} in the first batch, over "
            f"the {FLOAT16_AUTO_LIMIT:,.0f} up to which float16 is chosen by itself; use "
            "--encoding bfloat16 (as many bytes) or --encoding float32"
        )
    return resolve_preset("float16")


def stored_rows(x_BTd: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
    """(N, d) activations of the positions that are stored."""
    flat = x_BTd.reshape(-1, x_BTd.shape[-1])
    if np.array_equal(rows[[0, -1]], [0, len(rows) - 1]):
        return flat[: len(rows)]
    return flat.index_select(0, torch.from_numpy(rows).to(flat.device))


def _as_numpy(values: torch.Tensor) -> npt.NDArray[Any]:
    if values.dtype == torch.bfloat16:
        return values.view(torch.uint16).numpy()
    return values.numpy()


@contextmanager
def memory_explained(num_sequences: int | None = None) -> Iterator[None]:
    """Explain in one line that a forward pass, or with None the sums after one, took all memory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU's allocator raises a plain RuntimeError.
        if type(error) is RuntimeError and "allocate memory" not in str(error):
            raise
        if isinstance(error, ResourceError):
            raise
        where = "measuring the rows of a forward pass"
        if num_sequences is not None:
            where = f"a forward pass of {counted(num_sequences, 'sequence')}"
        raise ResourceError(
            f"out of memory in {where}; use a smaller "
            "--batch-size (it belongs to the plan, so begin again in an empty --out)"
        ) from error
