"""Memory that a run will hold; a run that needs too much is refused before anything is written."""

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator

from mlsae.base.errors import ResourceError
from mlsae.base.machine.resources import require_memory
from mlsae.base.ranks import environment_number
from mlsae.base.units import counted, format_bytes
from mlsae.sae import SAEConfig
from mlsae.sae.kernels.select import BLOCK_BYTES
from mlsae.train.plan import RunPlan
from mlsae.train.step.auxiliary import SAMPLE_ROWS, SAMPLE_SHARE, default_k_aux

_FLOAT = 4


def estimate(
    plans: Sequence[RunPlan], rank: int, world_size: int, num_workers: int = 1
) -> dict[str, int]:
    """Bytes by purpose of one rank: the `window` on the host, the rest on the device.

    Args:
        plans: plans of the SAEs that the rank trains in one pass.
        rank: rank among the processes that share the rows of a batch.
        world_size: number of those processes.
        num_workers: SAEs that take a step at the same time.
    """
    mixture = plans[0].mixture
    rows = mixture.rank_slots(rank, world_size)
    total = {"window": mixture.window_bytes(rank, world_size)}
    for plan in plans:
        parts = step_memory(
            plan.sae,
            min(rows, plan.config.micro_batch or rows),
            max(SAMPLE_ROWS, int(rows * SAMPLE_SHARE)),
            mixed=plan.config.precision == "bfloat16",
            world_size=world_size,
            active=plan.sae.architecture.expected_in_training(plan.config, plan.sae),
        )
        for name, size in parts.items():
            # Every SAE keeps its own; a step's memory is needed for each SAE at work.
            kept = name in ("weights", "Adam and gradients")
            before = total.get(name, 0)
            total[name] = before + size if kept else max(before, num_workers * size)
    if len(plans) > 1:
        total["decoded rows"] = rows * plans[0].sae.d_in * _FLOAT
    return total


def step_memory(
    sae: SAEConfig,
    rows: int,
    sampled_rows: int,
    *,
    mixed: bool,
    world_size: int = 1,
    active: int | None = None,
) -> dict[str, int]:
    """Bytes by purpose of a step: none grows with rows times latents.

    Args:
        sae: the SAE in training.
        rows: number of rows whose activations are in memory at once.
        sampled_rows: rows that AuxK sees.
        mixed: the encoder's product is in bfloat16.
        world_size: number of ranks.
        active: latents that a row takes memory for; None for the architecture's most.
    """
    architecture = sae.architecture
    weights = sum(math.prod(p.shape) for p in architecture.parameters(sae)) * _FLOAT
    active = active or architecture.most_in_training or sae.num_latents
    rows = min(rows, architecture.most_rows(sae.num_latents, _FLOAT) or rows)
    parts = {
        "weights": weights,
        "Adam and gradients": (3 if world_size == 1 else 4) * weights,
        # A block of pre-activations, what selecting from it takes and what the product keeps for
        # itself; the encoder in bfloat16, by which float32 is screened too.
        "activations": _rows_memory(rows, sae.d_in, active * 5 // 4 if mixed else active)
        + _nested_memory(rows, sae)
        + 3 * BLOCK_BYTES
        + weights // 4,
    }
    if architecture.revival is not None:
        # Should every latent be dead: their weights and gradients beside the others'.
        k_aux = default_k_aux(sae.d_in)
        parts["AuxK"] = _rows_memory(sampled_rows, sae.d_in, k_aux) + 2 * weights
    return parts


def _rows_memory(rows: int, d_in: int, k: int) -> int:
    # Standardised rows, reconstruction, residual and their gradients; values, places, their
    # transpose and the products at them, many of 8 bytes. Counted from measured peaks.
    return rows * (12 * d_in + 18 * k) * _FLOAT


def _nested_memory(rows: int, sae: SAEConfig) -> int:
    # A further prefix has its part of the sum, reconstruction, residual, its square, and gradients.
    # Counted from measured peaks.
    return (len(sae.prefixes) - 1) * rows * 10 * sae.d_in * _FLOAT


def require_training_memory(
    plans: Sequence[RunPlan],
    accelerator: Accelerator,
    rank: int,
    world_size: int,
    num_workers: int,
) -> None:
    """Refuse a run that this machine's memory, or its GPU's, cannot hold.

    Args:
        plans: plans of the SAEs that this process trains.
        accelerator: accelerator with the device.
        rank: argument of `estimate`.
        world_size: argument of `estimate`.
        num_workers: argument of `estimate`.

    Raises:
        ResourceError: too little memory; the message has the bytes of each purpose.
    """
    parts = estimate(plans, rank, world_size, num_workers)
    processes = environment_number("LOCAL_WORLD_SIZE", 1)
    share = f" in each of {processes} processes" if processes > 1 else ""
    remedy = "lower --window, --batch-size, --micro-batch or --num-latents"
    if len(plans) > 1:
        share = f" of {counted(len(plans), 'SAE')}{share}"
        remedy += ", or train fewer SAEs at once"
    if accelerator.device.type == "cuda":
        window = {"window": parts.pop("window")}
        free, _ = torch.cuda.mem_get_info(accelerator.device)
        needed = sum(parts.values())
        if needed > free:
            raise ResourceError(
                f"not enough memory on {accelerator.device} for training ({_detail(parts)}): needs "
                f"{format_bytes(needed)}, {format_bytes(free)} available; {remedy}"
            )
        parts = window
    require_memory(processes * sum(parts.values()), f"training ({_detail(parts)}{share})", remedy)


def _detail(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
