"""Training from a store against a plain dense loop over batches in memory, in rows a second.

The peer is what one would write in an afternoon: dense autograd through all latents, batches
already in RAM as float32, the same normalisation, loss, Adam and unit decoder rows. Rounds of both
alternate; a ratio is of medians over rounds, the first of which is discarded. Buffers and weights
are reused throughout, and system CPU time is printed, because on a virtual machine that hands freed
memory back to its host the price of fresh pages can hide everything else.

    python benchmarks/walk.py [--rounds 7] [--threads N] [--cache STORE]
"""

import argparse
import functools
import itertools
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mlsae.sae import SAE, TopK
from mlsae.store import Store, create, open_store
from mlsae.train import TrainConfig
from mlsae.train.data.loader import Batch, Loader
from mlsae.train.plan import RunPlan, make_plan
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.objective import Objective, layer_variances
from mlsae.train.step.optimizer import ADAM_BETAS, ADAM_EPS
from mlsae.train.step.trainer import Trainer


@dataclass(frozen=True)
class Shape:
    """Shape of the SAE, and steps of a round."""

    d_in: int
    num_latents: int
    k: int
    num_layers: int
    batch_rows: int
    num_tokens: int
    steps: int


STORIES260K = Shape(64, 1024, 16, 5, 4096, 400_000, 40)
LARGER = Shape(512, 8192, 32, 6, 4096, 40_000, 2)
RING = 8
WARM_STEPS = 12
"""Untimed steps of ours before each timed round: batches prepared during the peer's round."""


def make_store(shape: Shape, path: Path) -> None:
    """Random activations with structure: sparse sums of planted directions, layer on layer."""
    generator = np.random.default_rng(0)
    length = 256
    num_tokens = shape.num_tokens // length * length
    directions = generator.normal(size=(2 * shape.d_in, shape.d_in)).astype(np.float32)
    with create(
        path,
        tokens=np.zeros(num_tokens, np.int64),
        context_length=length,
        layers=range(shape.num_layers),
        d_model=shape.d_in,
        batch_sequences=16,
    ) as writer:
        while writer.position is not None:
            rows = min(16 * length, num_tokens - writer.position)
            stream = np.zeros((rows, shape.d_in), np.float32)
            batch = {}
            for layer in range(shape.num_layers):
                which = generator.integers(0, len(directions), (rows, 4))
                stream = stream + directions[which].sum(axis=1)
                batch["resid_post", layer] = stream
            writer.append(batch)


def our_trainer(plan: RunPlan) -> Trainer:
    moments = plan.store.moments(plan.site, 1)
    sae = SAE(plan.sae, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b.copy_(torch.from_numpy(moments.u_mean.mean(axis=0)))
    objective = Objective(
        sae, layer_variances(moments, plan.layers, "standardized"), "standardized"
    )
    dead = DeadLatents(plan.sae.num_latents, plan.dead_after, torch.device("cpu"))
    return Trainer(sae, objective, plan.schedule, dead, Accelerator(cpu=True))


class DenseLoop:
    """The peer: the same step in dense autograd, over a ring of batches in memory."""

    def __init__(self, plan: RunPlan, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        sae = SAE(plan.sae, torch.Generator().manual_seed(0))
        self.W_enc, self.W_dec, self.b = sae.W_enc, sae.W_dec, sae.b
        variances = layer_variances(plan.store.moments(plan.site, 1), plan.layers, "standardized")
        self.weights = torch.from_numpy(1 / variances).float()
        assert isinstance(plan.sae.architecture, TopK)
        self.k, self.batches, self.done = plan.sae.architecture.k, batches, 0
        self.adam = torch.optim.Adam(
            sae.parameters(), lr=plan.schedule.peak, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True
        )

    def step(self) -> None:
        """One step on the next batch of the ring."""
        x, layer = self.batches[self.done % len(self.batches)]
        self.done += 1
        std, mean = torch.std_mean(x, dim=1, keepdim=True)
        u = (x - mean) / (std + 1e-5)
        pre = (u - self.b) @ self.W_enc.T
        values, indices = torch.topk(pre, self.k, dim=1, sorted=False)
        z = torch.zeros_like(pre).scatter(1, indices, values.relu())
        u_hat = z @ self.W_dec + self.b
        loss = ((u - u_hat).square().sum(1) * self.weights[layer]).sum() / len(x)
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            W, grad = self.W_dec, self.W_dec.grad
            assert grad is not None
            grad -= (grad * W).sum(1, keepdim=True) * W
            self.adam.step()
            W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True))


def timed(work: Callable[[], None], steps: int) -> tuple[float, float]:
    """Seconds of wall time and of system CPU time."""
    system = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    start = time.perf_counter()
    for _ in range(steps):
        work()
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_stime - system


def measure(shape: Shape, store: Store, rounds: int) -> dict[str, Any]:
    config = TrainConfig(
        cache=Path(store.place),
        out=Path("unused"),
        num_latents=shape.num_latents,
        k=shape.k,
        batch_size=shape.batch_rows,
        epochs=1000,  # Never finished: long enough that no latent counts as dead meanwhile.
        lr=1e-3,
    )
    plan = make_plan(config, store)
    with Loader(plan.mixture, start=0, stop=RING) as loader:
        batches = [(batch.x.float(), batch.layer.clone()) for batch in loader]
    ours, dense = our_trainer(plan), DenseLoop(plan, batches)
    figures: dict[str, list[tuple[float, float]]] = {"ours": [], "ours_in_ram": [], "dense": []}
    in_ram = itertools.cycle(Batch(x, layer, len(x)) for x, layer in batches)
    with Loader(plan.mixture, start=0, stop=plan.num_steps) as loader:
        for number in range(rounds):
            for name in sorted(figures, reverse=number % 2 == 1):
                if name == "dense":
                    work, warm = dense.step, 1
                else:
                    source = loader if name == "ours" else in_ram
                    work, warm = functools.partial(_our_step, ours, source), WARM_STEPS
                timed(work, warm)
                figures[name].append(timed(work, shape.steps))
    rows = shape.steps * shape.batch_rows
    result: dict[str, Any] = {**asdict(shape), "num_tokens": store.num_tokens}
    for name, measured in figures.items():
        speeds = sorted(rows / seconds for seconds, _ in measured[1:])
        result[f"{name}_rows_per_second"] = round(statistics.median(speeds))
        result[f"{name}_range"] = [round(speeds[0]), round(speeds[-1])]
        share = sum(system for _, system in measured[1:]) / sum(wall for wall, _ in measured[1:])
        result[f"{name}_system_cpu_share"] = round(share, 3)
    ours_speed = result["ours_rows_per_second"]
    result["ratio"] = round(ours_speed / result["dense_rows_per_second"], 3)
    result["ratio_to_batches_in_ram"] = round(ours_speed / result["ours_in_ram_rows_per_second"], 3)
    return result


def _our_step(trainer: Trainer, batches: Iterator[Batch]) -> None:
    trainer.step(next(batches))


def cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    fields = dict(
        [part.strip() for part in line.split(":", 1)]
        for line in (info.read_text().splitlines() if info.exists() else [])
        if ":" in line
    )
    units = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sha_ni")
    flags = fields.get("flags", "").split()
    return {
        "model": fields.get("model name", platform.processor()),
        "flags": [unit for unit in units if unit in flags],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="the first is discarded")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cache", type=Path, help="a store of d_model 64 to use for the first shape"
    )
    parser.add_argument("--skip-larger", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for i, shape in enumerate([STORIES260K] if options.skip_larger else [STORIES260K, LARGER]):
            path = options.cache if i == 0 and options.cache else Path(temporary) / str(i)
            if not path.exists():
                make_store(shape, path)
            results.append(measure(shape, open_store(path), options.rounds))
            print(json.dumps(results[-1], indent=2), flush=True)
    summary = {
        "benchmark": "walk",
        "ratio": results[0]["ratio"],
        "wanted": 0.8,
        "shapes": results,
        "threads": options.threads,
        "rounds": options.rounds - 1,
        "torch": torch.__version__,
        "cpu": cpu(),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
