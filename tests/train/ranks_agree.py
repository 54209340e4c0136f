"""Run on several ranks: shares of batches train as whole batches do, in float64.

Every rank also takes the whole batch through the same objective alone, and compares.
"""

import os
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mlsae.sae import SAE, SAEConfig
from mlsae.sae.architectures import ArchitectureSettings, BatchTopK, get
from mlsae.train.data.loader import Batch
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.objective import Objective
from mlsae.train.step.schedule import Schedule
from mlsae.train.step.trainer import Trainer

STEPS, ROWS, D, N = 50, 40, 12, 64


def shared_budgets(accelerator: Accelerator) -> None:
    """Lanes of a batch on their ranks, beside all groups on one, for rows that share latents."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    config = SAEConfig(
        d_in=D, num_latents=N, architecture=BatchTopK(4), matryoshka_widths=(8, 24, N)
    )
    sae = SAE(config, torch.Generator().manual_seed(0)).double()
    sae.normalize_decoder()
    objective = Objective(sae, np.array([3.0, 5.0]), "standardized")
    dead = DeadLatents(N, 100 * ROWS, torch.device("cpu"))
    trainer = Trainer(sae, objective, Schedule(1e-2, 9, 0.1, 0.2), dead, accelerator)
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(ROWS, D, generator=generator, dtype=torch.float64)
        layer, lane = torch.randint(2, (2, ROWS), generator=generator)
        lane = lane + 2 * (torch.arange(ROWS) % 4)
        batch = Batch(x, layer, ROWS, lane=lane)
        order, sizes = lane.argsort(stable=True), tuple(torch.bincount(lane).tolist())
        sae.zero_grad()
        whole = objective.accumulate(x[order], layer[order], ROWS, None, groups=sizes)
        expected = {name: sae.get_parameter(name).grad for name in ("W_enc", "b")}
        sae.zero_grad()
        result = trainer.step(batch.part(lane % world_size == rank))
        np.testing.assert_allclose(result.loss, whole.main.item(), rtol=1e-9)
        torch.testing.assert_close(result.nested, whole.nested.double(), rtol=1e-9, atol=1e-12)
        for name, gradient in expected.items():
            found = sae.get_parameter(name).grad
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def objective_of(name: str) -> tuple[SAE, Objective]:
    """An SAE in float64 and its objective, the same on every rank."""
    kind = get(name)
    settings: Any = ArchitectureSettings(architecture=name, k=4, l1=0.01, target_l0=3)
    architecture = kind.wanted(settings)
    config = SAEConfig(
        d_in=D, num_latents=N, architecture=architecture, encoder_bias=kind.encoder_bias
    )
    sae = SAE(config, torch.Generator().manual_seed(0)).double()
    sae.normalize_decoder()
    settings = architecture.resolved(settings, config, 1.0)
    with torch.no_grad():
        architecture.prepare(sae.weights, settings)
    extra = architecture.extra_loss(settings, STEPS, sae.b)
    return sae, Objective(sae, np.array([3.0, 5.0]), "standardized", extra=extra, settings=settings)


def main() -> None:
    accelerator = Accelerator(cpu=True)
    shared_budgets(accelerator)
    for name in ("topk", "jumprelu", "gated"):
        check(accelerator, *objective_of(name))
    if accelerator.process_index == 0:
        print("ranks agree", flush=True)
    accelerator.wait_for_everyone()
    # A gloo thread may still have to let go of the last tensors, which it does under Python's lock:
    # an interpreter that is being torn down at that moment aborts the process.
    os._exit(0)


def check(accelerator: Accelerator, sae: SAE, objective: Objective) -> None:
    rank, world_size = accelerator.process_index, accelerator.num_processes
    assert world_size in (2, 4), f"{world_size} ranks, not 2 or 4"
    dead = DeadLatents(N, 3 * ROWS, torch.device("cpu"))
    trainer = Trainer(sae, objective, Schedule(1e-2, STEPS, 0.1, 0.2), dead, accelerator)
    most_dead = 0
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(ROWS, D, generator=generator, dtype=torch.float64)
        layer = torch.randint(2, (ROWS,), generator=generator)
        # Unequal shares; in every fifth step rank 0 has every row.
        cut = ROWS if step % 5 == 0 else 7 + step % 20
        rest = -(-(ROWS - cut) // (world_size - 1))
        first = cut + (rank - 1) * rest
        mine = slice(0, cut) if rank == 0 else slice(first, first + rest)
        gone = dead.indices()
        sae.zero_grad()
        whole = objective.accumulate(x, layer, ROWS, step if len(gone) else None, step=step)
        loss = whole.main
        if whole.residual is not None:
            loss = loss + objective.accumulate_auxiliary(
                [whole.residual], gone, lambda total: total
            )
        expected = [parameter.grad for parameter in sae.parameters()]
        most_dead = max(most_dead, len(gone))
        result = trainer.step(Batch(x[mine], layer[mine], ROWS))
        close = {"rtol": 1e-9, "atol": 1e-12}
        np.testing.assert_allclose(result.loss, loss.item(), rtol=1e-9)
        for parameter, gradient in zip(sae.parameters(), expected, strict=True):
            if parameter is not sae.W_dec:  # The trainer takes off a part.
                torch.testing.assert_close(parameter.grad, gradient, **close)
        torch.testing.assert_close(result.layer_errors, whole.layer_errors, **close)
        assert result.layer_rows.tolist() == whole.layer_rows.tolist()
        assert dead.num_rows == (step + 1) * ROWS
    assert most_dead > 0 or not objective.has_auxiliary
    both = accelerator.gather(torch.stack([p.sum() for p in sae.parameters()])[None])
    assert all(torch.equal(both[0], other) for other in both[1:])


if __name__ == "__main__":
    main()
