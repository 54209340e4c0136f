"""The contestants of `benchmarks/step.py`: each runs in a process of its own, one step when told.

A line on stdin is a command: `step` answers with the seconds of one step, of its parts and of CPU;
`memory` with the growth of the process's largest resident size since its imports. This file imports
nothing of mlsae until our own step is asked for, because the published code has the same package
name.
"""

import importlib
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RING = 4
ADAM: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 6.25e-10, "fused": True}
Step = Callable[[torch.Tensor], dict[str, float]]
"""Takes a batch, gives the seconds of its parts, if it knows them."""


def package(name: str, path: Path) -> None:
    """A package whose modules can be imported although its `__init__` is not run.

    The `__init__` of every peer pulls in what only its whole training loop needs.
    """
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module


def product(num_latents: int, d_in: int, dtype: torch.dtype, rows: int, *, fresh: bool) -> Step:
    """The dense encoder product alone, into a fresh tensor or always the same one."""
    W = (torch.rand(num_latents, d_in) - 0.5).to(dtype)
    out = None if fresh else torch.empty(rows, num_latents, dtype=dtype)

    def step(x: torch.Tensor) -> dict[str, float]:
        torch.mm(x.to(dtype), W.T, out=out)
        return {}

    return step


def ours(
    num_latents: int,
    d_in: int,
    k: int,
    *,
    mixed: bool,
    dead: bool,
    architecture: str = "topk",
    prefixes: int = 1,
) -> Step:
    """A step of `mlsae train`, its batch in memory; with `dead`, a quarter of the latents is."""
    import numpy as np
    from accelerate import Accelerator

    from mlsae.base.machine.heap import keep_freed_memory
    from mlsae.sae import SAE, SAEConfig
    from mlsae.sae.architectures import ArchitectureSettings, batchtopk, get, topk
    from mlsae.sae.architectures.matryoshka import widths
    from mlsae.train.data.loader import Batch
    from mlsae.train.data.sampler import NUM_LANES
    from mlsae.train.step.dead import DeadLatents
    from mlsae.train.step.objective import Objective
    from mlsae.train.step.optimizer import Optimizer
    from mlsae.train.step.schedule import Schedule
    from mlsae.train.step.trainer import Trainer

    keep_freed_memory()
    sae = SAE(
        SAEConfig(
            d_in=d_in,
            num_latents=num_latents,
            architecture=get(architecture).wanted(
                ArchitectureSettings(architecture=architecture, k=k)
            ),
            matryoshka_widths=widths((prefixes,), num_latents) if prefixes > 1 else None,
        ),
        torch.Generator().manual_seed(0),
    )
    unused = DeadLatents(num_latents, 10**11, torch.device("cpu"))
    objective = Objective(sae, np.full(6, float(d_in)), "standardized", mixed=mixed)
    schedule = Schedule(ADAM["lr"], 10**6, 0, 0)
    trainer = Trainer(sae, objective, schedule, unused, Accelerator(cpu=True))
    parts: dict[str, float] = {}

    def timed(owner: Any, attribute: str, name: str) -> None:
        inner = getattr(owner, attribute)

        def outer(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            parts[name] = parts.get(name, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, attribute, outer)

    timed(topk, "select_mixed" if mixed else "select", "selection")
    timed(batchtopk, "select_by_group", "selection")
    timed(SAE, "reconstructions", "decode")
    timed(torch.autograd, "backward", "backward")
    timed(Objective, "accumulate_auxiliary", "AuxK")
    timed(Optimizer, "step", "update")

    def step(x: torch.Tensor) -> dict[str, float]:
        parts.clear()
        if dead:
            unused.last_used[: num_latents // 4] = -(10**12)
        rows = torch.arange(len(x))
        trainer.step(Batch(x, rows % 6, len(x), lane=rows // 6 % NUM_LANES))
        return dict(parts)

    return step


def sparsify(num_latents: int, d_in: int, k: int, path: Path, *, mixed: bool) -> Step:
    """EleutherAI/sparsify's SparseCoder in the order of its trainer, but with Adam."""
    package("sparsify", path / "sparsify")
    coder = importlib.import_module("sparsify.sparse_coder")
    config = importlib.import_module("sparsify.config")
    sae = coder.SparseCoder(d_in, config.SparseCoderConfig(num_latents=num_latents, k=k))
    adam = torch.optim.Adam(sae.parameters(), **ADAM)

    def step(x: torch.Tensor) -> dict[str, float]:
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = sae(x).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        return {}

    return step


def dictionary_learning(num_latents: int, d_in: int, k: int, path: Path) -> Step:
    """saprmarks/dictionary_learning's TopKTrainer, its Adam replaced by the common one."""
    package("dictionary_learning", path / "dictionary_learning")
    package("dictionary_learning.trainers", path / "dictionary_learning" / "trainers")
    top_k = importlib.import_module("dictionary_learning.trainers.top_k")
    trainer = top_k.TopKTrainer(
        10**6, d_in, num_latents, k, layer=0, lm_name="none", lr=ADAM["lr"], device="cpu"
    )
    trainer.optimizer = torch.optim.Adam(trainer.ae.parameters(), **ADAM)

    def step(x: torch.Tensor) -> dict[str, float]:
        trainer.update(1, x)  # Step 0 alone would also compute a geometric median.
        return {}

    return step


def published(num_latents: int, d_in: int, k: int, path: Path) -> Step:
    """tim-lawson/mlsae's MLSAE with its two losses; its AuxK cannot be turned off."""
    for name in ("mlsae", "mlsae.model", "mlsae.metrics"):
        package(name, path.joinpath(*name.split(".")))
    autoencoder = importlib.import_module("mlsae.model.autoencoder")
    auxiliary = importlib.import_module("mlsae.metrics.auxiliary_loss").AuxiliaryLoss(1 / 32)
    mse = importlib.import_module("mlsae.metrics.mse_loss").MSELoss(1)
    sae = autoencoder.MLSAE(d_in, num_latents, k, dead_steps_threshold=10**9)
    adam = torch.optim.Adam(sae.parameters(), **ADAM)

    def step(x: torch.Tensor) -> dict[str, float]:
        inputs = x[None, None]
        output = sae(inputs)
        loss = mse(inputs=inputs, recons=output.recons) + auxiliary(
            inputs=inputs, recons=output.recons, auxk_recons=output.auxk_recons
        )
        adam.zero_grad()
        loss.backward()
        autoencoder.unit_norm_decoder(sae.decoder)
        autoencoder.unit_norm_decoder_gradient(sae.decoder)
        adam.step()
        return {}

    return step


def make(name: str, rows: int, d_in: int, num_latents: int, k: int, path: Path) -> Step:
    """The contestant of this name."""
    kind, _, variant = name.partition(" ")
    if kind == "product":
        dtype = torch.bfloat16 if "bfloat16" in variant else torch.float32
        return product(num_latents, d_in, dtype, rows, fresh="fresh" in variant)
    if kind == "ours":
        words = variant.split()
        return ours(
            num_latents,
            d_in,
            k,
            mixed="bfloat16" in words,
            dead="dead" in words,
            architecture="batchtopk" if "batchtopk" in words else "topk",
            prefixes=4 if "matryoshka" in words else 1,
        )
    if kind == "sparsify":
        return sparsify(num_latents, d_in, k, path, mixed="bfloat16" in variant)
    return {"dictionary_learning": dictionary_learning, "mlsae": published}[kind](
        num_latents, d_in, k, path
    )


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return 1024 * int(status.split()[0])


def main() -> None:
    name, *numbers, path = sys.argv[1:]
    rows, d_in, num_latents, k = map(int, numbers)
    torch.manual_seed(0)
    before = peak()
    batches = [torch.randn(rows, d_in) for _ in range(RING)]
    step = make(name, rows, d_in, num_latents, k, Path(path))
    print(json.dumps({"ready": True}), flush=True)
    for number, line in enumerate(sys.stdin):
        if line.strip() == "memory":
            print(json.dumps({"bytes": peak() - before}), flush=True)
            continue
        start, start_cpu = time.perf_counter(), time.process_time()
        parts = step(batches[number % RING])
        answer = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - start_cpu,
            "parts": parts,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
