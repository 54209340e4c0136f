"""A process that finds examples as tim-lawson/mlsae does: its `analysis/examples.py`, as it is.

A line on stdin is a command: `step` takes the batch once, `delete` deletes what is not among the
strongest; each is answered with what it did. This file imports nothing of ours, because the
published code has the same package name; of that, what only finds text and models is left out.

    python analyze_original.py CHECKOUT BATCH.npz K MODEL DATABASE NUM_EXAMPLES THREADS
"""

import importlib
import json
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


@dataclass
class Nothing:
    """In place of settings that are not asked for."""


def stand_in(name: str, path: Path | None = None, **content: Any) -> None:
    """A module, or with a path a package whose `__init__` is not run."""
    module = types.ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    module.__dict__.update(content)
    sys.modules[name] = module


def main() -> None:
    checkout, batch, k, model, database, num_examples, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    root = Path(checkout) / "mlsae"
    stand_in("mlsae", root)
    stand_in("mlsae.model", root / "model", DataConfig=Nothing, MLSAETransformer=Nothing)
    stand_in("mlsae.model.data", get_train_dataloader=None)
    stand_in("mlsae.trainer", initialize=None)
    stand_in("mlsae.utils", get_device=None)
    stand_in("mlsae.analysis", root / "analysis")
    examples = importlib.import_module("mlsae.analysis.examples")
    autoencoder = importlib.import_module("mlsae.model.autoencoder")
    held = np.load(batch)
    activations = torch.from_numpy(held["activations"]).float()
    num_latents, d_in = held["encoder"].shape
    sae = autoencoder.MLSAE(d_in, num_latents, int(k), dead_steps_threshold=10**9, auxk=None)
    sae.encoder.weight.data = torch.from_numpy(held["encoder"])
    sae.pre_encoder_bias.data = torch.from_numpy(held["bias"])
    whole = types.SimpleNamespace(
        transformer=types.SimpleNamespace(
            forward=lambda _tokens: activations,
            tokenizer=transformers.AutoTokenizer.from_pretrained(model),
        ),
        autoencoder=sae,
    )
    tokens = torch.from_numpy(held["tokens"])
    connection, cursor = examples.create_db(database)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        answer: dict[str, Any] = {}
        if line.strip() == "delete":
            examples.delete_examples(cursor, int(num_examples))
        else:
            with torch.no_grad():
                found = list(examples.get_examples(whole, {"input_ids": tokens}, 4))
            examples.insert_examples(cursor, found)
            answer = {"tokens": tokens.numel(), "events": len(found)}
        connection.commit()
        print(json.dumps(answer | {"seconds": round(time.perf_counter() - began, 2)}), flush=True)


if __name__ == "__main__":
    main()
