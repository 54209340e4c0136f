"""How many sequences a forward pass takes, found once by memory and then fixed in the plan."""

from collections.abc import Sequence

import torch

from mlsae.base.resources import available_memory
from mlsae.harvest.compute.forward import PINNED, memory_explained
from mlsae.harvest.config import HarvestConfig
from mlsae.models import Transformer
from mlsae.models.capture import capture
from mlsae.models.inputs import Inputs
from mlsae.store.format.encoding import Part, parts_of
from mlsae.store.format.presets import resolve_preset

TOKENS_AT_ONCE = {"cpu": 2**13, "cuda": 2**16}
"""Beyond these a larger pass gains no more speed."""
MEMORY_SHARE = 0.5
"""Of what is free, left over for the allocator's fragments and for other programs."""


def useful_batch_size(
    device_kind: str, context_length: int, d_model: int, config: HarvestConfig
) -> int:
    """The largest power of two that speed and the size of a shard have a use for."""
    kept = context_length if config.keep_positions is None else config.keep_positions
    most = min(
        TOKENS_AT_ONCE.get(device_kind, TOKENS_AT_ONCE["cpu"]) // context_length,
        # Larger batches would only make larger shards, for shards hold whole ones.
        config.shard_bytes // (kept * _parts(config, d_model)[0].row_bytes),
    )
    return _power_of_two(most)


def choose_batch_size(
    transformer: Transformer,
    config: HarvestConfig,
    *,
    context_length: int,
    layers: Sequence[int],
    sites: Sequence[str],
) -> int:
    """The largest useful power of two that memory has room for.

    On CUDA the bytes of a sequence are measured on passes of one and of two sequences; on the CPU,
    where torch does not count them, they are added up from what is captured and buffered and twice
    the widest layer of the model.

    Raises:
        ResourceError: not even two sequences fit on the GPU.
    """
    kind, width = transformer.device.type, transformer.d_model
    rows = len(layers) * len(sites) * context_length
    captured = rows * width
    buffered = rows * sum(part.row_bytes for part in _parts(config, width)) * PINNED
    if kind == "cuda":
        one, two = (_peak_bytes(transformer, num, context_length, layers, sites) for num in (1, 2))
        free, _ = torch.cuda.mem_get_info(transformer.device)
        fitting = [(free - one, two - one), (available_memory(), buffered)]
    else:
        text_config = transformer.model.config.get_text_config()
        widest = max(int(getattr(text_config, "intermediate_size", None) or 4 * width), 3 * width)
        heads = int(getattr(text_config, "num_attention_heads", 1))
        values = captured + context_length * (2 * widest + 8 * width)
        if transformer.attention_implementation == "eager":
            values += 2 * heads * context_length**2
        fitting = [(available_memory(), buffered + values * transformer.dtype.itemsize)]
    most = min(int(free * MEMORY_SHARE) // max(needed, 1) for free, needed in fitting)
    return min(_power_of_two(most), useful_batch_size(kind, context_length, width, config))


def _parts(config: HarvestConfig, d_model: int) -> tuple[Part, ...]:
    return parts_of(resolve_preset(config.sized_as).encoding, d_model)


def _power_of_two(most: int) -> int:
    return 1 << (max(most, 1).bit_length() - 1)


def _peak_bytes(
    transformer: Transformer,
    num_sequences: int,
    context_length: int,
    layers: Sequence[int],
    sites: Sequence[str],
) -> int:
    device = transformer.device
    tokens = torch.zeros((num_sequences, context_length), dtype=torch.long)
    with memory_explained(num_sequences), torch.inference_mode():
        capture(transformer, Inputs(tokens=tokens[:1]), layers, sites)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        capture(transformer, Inputs(tokens=tokens), layers, sites)
        torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before
