"""The contestants of `benchmarks/online.py`: each trains in a process of its own, when told.

A line on stdin is a number of steps; the answer, a JSON object, is their seconds and CPU seconds.
This file imports nothing of mlsae until our own training is asked for, because the published code
has the same package name.
"""

import importlib
import itertools
import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

RING = 8
"""Batches in memory."""
ENDLESS = 10**6
"""Epochs or steps: more than are ever asked for."""


class Turns:
    """Waits for a number of steps, and answers when they are done."""

    def __init__(self) -> None:
        self.left = 0

    def begin(self) -> None:
        """Wait for the next line."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit
        self.left = int(line)
        self.start, self.start_cpu = time.perf_counter(), time.process_time()

    def step_ended(self) -> None:
        """One step is done."""
        self.left -= 1
        if self.left == 0:
            seconds = time.perf_counter() - self.start
            say({"seconds": seconds, "cpu_seconds": time.process_time() - self.start_cpu})
            self.begin()


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def ours(settings: dict[str, Any]) -> None:
    """The steps of `mlsae train`: its loader, its member of a pass, its batches.

    In memory, batches are a few of the same, widened to float32 beforehand. From the store, every
    chunk has been checked once before, which the first epoch of a run does; the CPU seconds of a
    batch are told for an epoch with and without, nothing else running.
    """
    from accelerate import Accelerator

    from mlsae.base.machine.heap import keep_freed_memory
    from mlsae.store import open_store
    from mlsae.train import TrainConfig
    from mlsae.train.data.decode import RowDecoder
    from mlsae.train.data.loader import Batch, Loader
    from mlsae.train.plan import make_plan
    from mlsae.train.running.member import Member

    keep_freed_memory()
    path = Path(settings["store"])
    config = TrainConfig(
        cache=path,
        out=Path("unused"),
        num_latents=settings["num_latents"],
        k=settings["k"],
        batch_size=settings["rows"],
        epochs=ENDLESS,
        lr=settings["lr"],
        device="cpu",
        precision=settings["precision"],
    )
    plan = make_plan(config, open_store(path))
    mixture = plan.mixture
    decode = RowDecoder(mixture.store, mixture.site, mixture.layers, torch.device("cpu"))
    member = Member(plan, Accelerator(cpu=True), decode, writes=False)
    turns = Turns()

    loading: dict[str, list[float]] = {}

    def train(batches: Iterator[Batch]) -> None:
        say({"parts": loading})
        turns.begin()
        for batch in batches:
            member.step(batch)
            turns.step_ended()

    if settings["in_memory"]:
        with Loader(mixture, start=0, stop=RING) as loader:
            held = [Batch(b.x.float(), b.layer.clone(), b.num_rows) for b in loader]
        train(itertools.cycle(held))
    else:
        with Loader(mixture, start=0, stop=plan.num_steps) as loader:
            for name in ("loading, checked", "loading"):
                start = time.process_time()
                for _ in range(mixture.epoch_steps):
                    next(loader)
                loading[name] = [(time.process_time() - start) / mixture.epoch_steps]
            train(loader)


def published(settings: dict[str, Any]) -> None:
    """tim-lawson/mlsae's MLSAETransformer in Lightning's Trainer, as its `train.py` makes both.

    Its batches are random tokens that lie in memory. It neither logs, validates nor saves. A step
    is an optimiser's step: gradients are not accumulated over batches. It is in float32: on a CPU
    its sparse products have no gradient under autocast. The packages of loggers and of tuned
    lenses, which it imports and does not use so, need not be there.
    """
    from lightning.pytorch import Callback, Trainer
    from transformers import GPTNeoXForCausalLM  # noqa: F401  # It looks for real loggers.

    path = Path(settings["published"])
    for name in ("mlsae", "mlsae.model"):
        # The `__init__` of the peer pulls in libraries that only text needs.
        module = types.ModuleType(name)
        module.__path__ = [str(path.joinpath(*name.split(".")))]
        sys.modules[name] = module
    for name in ("wandb", "wandb.plot", "tuned_lens"):
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules["tuned_lens"])["TunedLens"] = None

    torch.set_float32_matmul_precision("high")
    length, sequences = settings["context_length"], settings["sequences"]
    model = importlib.import_module("mlsae.model.lightning").MLSAETransformer(
        settings["model"],
        expansion_factor=settings["num_latents"] // settings["d_in"],
        k=settings["k"],
        auxk=settings["auxk"],
        lr=settings["lr"],
        max_length=length,
        batch_size=sequences,
        accumulate_grad_batches=1,
    )
    turns = Turns()

    class TakeTurns(Callback):  # type: ignore[misc]
        """Holds the trainer until steps are asked for."""

        def on_train_start(self, *_: Any) -> None:
            say({"parts": {}})
            turns.begin()

        def on_train_batch_end(self, *_: Any) -> None:
            turns.step_ended()

    class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        """Random sequences of tokens that are not special."""

        def __init__(self) -> None:
            self.ids = torch.randint(1, settings["vocabulary"], (64, length))

        def __len__(self) -> int:
            return ENDLESS

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.ids[index % len(self.ids)]}

    trainer = Trainer(
        accelerator="cpu",
        precision="32-true",
        deterministic=settings["deterministic"],
        max_steps=ENDLESS,
        limit_val_batches=0,
        logger=False,
        callbacks=[TakeTurns()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train_dataloaders=torch.utils.data.DataLoader(Tokens(), sequences))


if __name__ == "__main__":
    torch.manual_seed(0)
    given = json.loads(sys.argv[1])
    (published if "published" in given else ours)(given)
