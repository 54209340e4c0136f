"""One batch through the loaded transformer, before a plan is fixed or a dry run is told."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from mlsae.harvest.compute.batch_size import choose_batch_size, enough_shards_size
from mlsae.harvest.compute.batches import Batches, Slice
from mlsae.harvest.compute.forward import choose_encoding, preflight
from mlsae.harvest.plan import Request, kept_by
from mlsae.harvest.text.packing import PackedText
from mlsae.models import Transformer
from mlsae.models.sites import check_sites
from mlsae.store.format.presets import Preset


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Choices that follow from the model's first batch."""

    batches: Batches
    """Batches of the text, of a size that memory has room for."""
    sites: tuple[str, ...]
    """Sites in the order of a block, found in the model."""
    preset: Preset
    """Encoding that the values of the batch fit."""
    run: Callable[[], object]
    """Runs the batch once more."""
    num_sequences: int
    """Sequences of the batch."""

    def seconds(self) -> float:
        """Time that one more pass of the batch takes, now that the model is warm."""
        began = time.perf_counter()
        self.run()
        return time.perf_counter() - began


def try_batch(request: Request, model: Transformer, packed: PackedText) -> Trial:
    """Find the size of a batch, run the first one and choose the encoding.

    Raises:
        InputError: a site is not found, values are not finite or too large for the encoding.
        ResourceError: the device has too little memory.
    """
    config, length = request.config, request.context_length
    sites = check_sites(model, request.sites)
    batch_sequences = request.batch_sequences
    if request.batch_is_free:
        num_sequences = len(packed.tokens) // length
        enough = enough_shards_size(model.device.type, length, num_sequences)
        batch_sequences = choose_batch_size(
            model,
            most=min(batch_sequences, enough),
            row_bytes=request.row_bytes,
            context_length=length,
            layers=request.layers,
            sites=sites,
        )
    batches = Batches(
        tokens=_slices(packed.tokens),
        documents=_slices(packed.documents) if config.isolate_documents else None,
        token_flags=_slices(packed.token_flags) if config.packing == "document" else None,
        context_length=length,
        batch_sequences=batch_sequences,
        keep=kept_by(config),
    )
    num_sequences = min(batch_sequences, len(packed.tokens) // length)
    # All positions are looked at, those that are not stored too.
    batch = replace(batches, keep=None).batch(0, num_sequences)
    largest = preflight(model, batch, request.layers, sites)
    return Trial(
        batches=batches,
        sites=sites,
        preset=choose_encoding(config.asked_encoding, model.dtype, largest),
        run=lambda: preflight(model, batch, request.layers, sites),
        num_sequences=num_sequences,
    )


def _slices(values: npt.NDArray[Any]) -> Slice:
    return lambda start, stop: values[start:stop]
