"""What a run will hold in memory, refused before anything is written if it is too much."""

import os

from accelerate import Accelerator

from mlsae.base.resources import require_memory
from mlsae.base.units import format_bytes
from mlsae.sae.select import BLOCK_BYTES
from mlsae.train.plan import Plan

_FLOAT = 4


def estimate(plan: Plan, rank: int, world_size: int) -> dict[str, int]:
    """Bytes by purpose of one rank: `window` and batches on the host, the rest on the device."""
    width, num_latents = plan.sae.d_in, plan.sae.num_latents
    rows = plan.mixture.rank_slots(rank, world_size)
    weights = 2 * num_latents * width * _FLOAT
    return {
        "window": plan.mixture.window_bytes(rank, world_size)
        + 4 * rows * width * plan.store.parts[0].dtype.itemsize,
        "weights": weights,
        "Adam and gradients": (3 if world_size == 1 else 4) * weights,
        # Standardised rows, reconstruction, residual and their gradients; a block of
        # pre-activations and what selecting from it takes.
        "activations": 8 * rows * (width + plan.sae.k) * _FLOAT + 2 * BLOCK_BYTES,
    }


def require_training_memory(plan: Plan, accelerator: Accelerator) -> None:
    """Refuse a run that this machine's memory cannot hold.

    On a GPU only the window is counted: the rest lies in the GPU's own memory.

    Raises:
        ResourceError: with the number of bytes for each purpose.
    """
    parts = estimate(plan, accelerator.process_index, accelerator.num_processes)
    if accelerator.device.type != "cpu":
        parts = {"window": parts["window"]}
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    detail = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    share = f" in each of {processes} processes" if processes > 1 else ""
    require_memory(
        processes * sum(parts.values()),
        f"training ({detail}{share})",
        "lower --window, --batch-size or --num-latents",
    )
