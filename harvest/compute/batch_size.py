"""Sequences in a forward pass: found once by memory, then fixed in the plan."""

from collections.abc import Sequence

import torch

from mlsae.base.machine.resources import available_memory
from mlsae.harvest.compute.forward import PINNED, memory_explained
from mlsae.models import Transformer
from mlsae.models.capture import capture
from mlsae.models.inputs import Inputs
from mlsae.store.format.layout import ENOUGH_SHARDS

TOKENS_AT_ONCE = {"cpu": 2**13, "cuda": 2**16}
"""Beyond these a larger pass gains no more speed."""
_FEWEST = 4
"""Divisor of them for the least tokens of a pass of a small text. On a CPU a token took 0.9 of the
time then, in a block of width 576."""
MEMORY_SHARE = 0.5
"""Share of free memory; the rest is left to the allocator's fragments and other programs."""


def enough_shards_size(device_kind: str, context_length: int, num_sequences: int) -> int:
    """Largest power of two with which a small text makes enough shards, that still has speed."""
    tokens = TOKENS_AT_ONCE.get(device_kind, TOKENS_AT_ONCE["cpu"]) // _FEWEST
    return _power_of_two(max(num_sequences // ENOUGH_SHARDS, tokens // context_length))


def useful_batch_size(device_kind: str, context_length: int, shard_sequences: int) -> int:
    """Largest power of two that speed and the size of a shard have a use for.

    Args:
        device_kind: type of the device that computes.
        context_length: tokens per sequence.
        shard_sequences: sequences that a shard has room for: larger batches would only make larger
            shards, for shards hold whole batches.
    """
    tokens = TOKENS_AT_ONCE.get(device_kind, TOKENS_AT_ONCE["cpu"])
    return _power_of_two(min(tokens // context_length, shard_sequences))


def choose_batch_size(
    transformer: Transformer,
    *,
    most: int,
    row_bytes: int,
    context_length: int,
    layers: Sequence[int],
    sites: Sequence[str],
) -> int:
    """Largest power of two up to `most` that memory has room for.

    On CUDA the bytes of a sequence are measured on passes of one and of two sequences; on the CPU,
    where torch does not count them, captured and buffered rows are added to twice the widest layer
    of the model.

    Args:
        transformer: the loaded model.
        most: power of two, the most sequences that are useful.
        row_bytes: bytes that a stored row takes at one site and layer.
        context_length: tokens per sequence.
        layers: blocks to capture.
        sites: sites to capture.

    Raises:
        ResourceError: not even two sequences fit on the GPU.
    """
    kind, width = transformer.device.type, transformer.d_model
    rows = len(layers) * len(sites) * context_length
    captured = rows * width
    buffered = rows * row_bytes * PINNED
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
    room = min(int(free * MEMORY_SHARE) // max(needed, 1) for free, needed in fitting)
    return min(_power_of_two(room), most)


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
