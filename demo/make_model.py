"""`python -m mlsae.demo.make_model`: train the demo transformer from the shipped text.

The model must have learnt, and must not have learnt by heart: on modules that it never saw its
cross-entropy is to lie MIN_BELOW_UNIGRAM nats under a unigram model's and within MAX_GAP of the
cross-entropy on its training text. Any other model is not written.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlsae.base.errors import MlsaeError
from mlsae.base.files import sha256_file, write_durably
from mlsae.base.units import counted
from mlsae.demo import corpus, model_path, text_path
from mlsae.demo.scoring import Ids, cross_entropy, unigram_cross_entropy
from mlsae.demo.text_files import (
    HELD_OUT,
    TRAIN,
    difference_from_running,
    read_sources,
    read_texts,
    write_running,
)
from mlsae.demo.tokenizer import pack, save_tokenizer, train_tokenizer

SEED = 0
MIN_BELOW_UNIGRAM = 1.5
MAX_GAP = 0.3
SHAPE: dict[str, int] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
}
OPTIMISATION: dict[str, Any] = {
    "steps": 1500,
    "batch_sequences": 16,
    "learning_rate": 4e-3,
    "final_learning_rate": 2e-4,
    "warmup_steps": 100,
    "betas": [0.9, 0.95],
    "weight_decay": 0.1,
    "dropout": 0.1,
    "max_gradient_norm": 1.0,
}


class UnfitModelError(MlsaeError):
    """The trained model misses a cross-entropy that the demo promises."""


def build_model() -> Any:
    """A GPT-NeoX (rotary embedding, parallel residual) of SHAPE with random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings: dict[str, Any] = {
        **SHAPE,
        "use_parallel_residual": True,
        "hidden_dropout": OPTIMISATION["dropout"],
        "attention_dropout": OPTIMISATION["dropout"],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**settings))


def train(model: Any, ids: Ids) -> None:
    """Train `model` in place on random stretches of packed ids (num_tokens,)."""
    settings = OPTIMISATION
    length = SHAPE["max_position_embeddings"]
    optimizer = _optimizer(model, settings)
    generator = torch.Generator().manual_seed(SEED)
    stretches_NT = torch.from_numpy(ids).unfold(0, length, 1)
    start = time.monotonic()
    model.train()
    for step in range(1, settings["steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, settings)
        chosen = torch.randint(
            len(stretches_NT), (settings["batch_sequences"],), generator=generator
        )
        ids_BT = stretches_NT[chosen]
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_gradient_norm"])
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.monotonic() - start
            print(f"step {step:,}: loss {loss.item():.3f} nats, {seconds:.0f} s", flush=True)
    model.eval()


def _optimizer(model: Any, settings: dict[str, Any]) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=tuple(settings["betas"]),
    )


def _learning_rate(step: int, settings: dict[str, Any]) -> float:
    """Linear warm-up, then half a cosine down to the final rate."""
    first, last = settings["learning_rate"], settings["final_learning_rate"]
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings["steps"]))
    return float(min(step / settings["warmup_steps"], 1) * (last + (first - last) * cosine))


def score(model: Any, train_ids: Ids, held_out_ids: Ids) -> dict[str, float]:
    """The cross-entropies, in nats a token."""
    length = SHAPE["max_position_embeddings"]
    return {
        "train": cross_entropy(model, train_ids, length),
        "held_out": cross_entropy(model, held_out_ids, length),
        "unigram_held_out": unigram_cross_entropy(
            train_ids, held_out_ids, length, SHAPE["vocab_size"]
        ),
    }


def check(nats: dict[str, float]) -> None:
    """Compare the cross-entropies with the promises of the demo.

    Raises:
        UnfitModelError: a promise is missed; the message names it.
    """
    below = nats["unigram_held_out"] - nats["held_out"]
    if below < MIN_BELOW_UNIGRAM:
        raise UnfitModelError(
            f"the model learnt too little: held-out cross-entropy is {below:.3f} nats below "
            f"the unigram model's, expected at least {MIN_BELOW_UNIGRAM}; nothing was written"
        )
    gap = nats["held_out"] - nats["train"]
    if gap > MAX_GAP:
        raise UnfitModelError(
            f"the model learnt its text by heart: held-out cross-entropy is {gap:.3f} nats above "
            f"training text's, expected at most {MAX_GAP}; nothing was written"
        )


def _record(directory: Path, nats: dict[str, float], sources: dict[str, Any]) -> None:
    record = {
        "command": "python -m mlsae.demo.make_model",
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "shape": SHAPE,
        "optimisation": OPTIMISATION,
        "cross_entropy_nats_per_token": nats,
        "text": sources,
        "weights_sha256": sha256_file(directory / "model.safetensors"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("transformers", "tokenizers", "numpy")},
        },
        "machine": platform.machine(),
    }
    write_durably(directory / "training.json", (json.dumps(record, indent=2) + "\n").encode())


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def make(out: Path, *, collect: bool) -> None:
    """Train, score, print the cross-entropies and write the model to `out`."""
    if collect:
        write_running(text_path())
    sources = read_sources(text_path())
    difference = difference_from_running(sources, corpus.collect())
    if difference is not None:
        print(difference, file=sys.stderr)
    train_texts, held_out_texts = (read_texts(text_path() / name) for name in (TRAIN, HELD_OUT))
    tokenizer = train_tokenizer(train_texts, SHAPE["vocab_size"])
    train_ids, held_out_ids = pack(tokenizer, train_texts), pack(tokenizer, held_out_texts)
    print(
        f"{sources['what']} ({sources['python']}, {sources['licence']}): "
        f"{counted(len(train_texts), 'module')}, {counted(len(train_ids), 'token')} to train on; "
        f"{counted(len(held_out_texts), 'module')}, {counted(len(held_out_ids), 'token')} held out"
    )
    torch.manual_seed(SEED)
    model = build_model()
    train(model, train_ids)
    nats = score(model, train_ids, held_out_ids)
    print(
        f"cross-entropy in nats a token: held out {nats['held_out']:.3f}, "
        f"{nats['unigram_held_out'] - nats['held_out']:.3f} below a unigram model's "
        f"{nats['unigram_held_out']:.3f} and {nats['held_out'] - nats['train']:.3f} above "
        f"training text's {nats['train']:.3f}"
    )
    check(nats)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    _record(out, nats, sources)
    size = (out / "model.safetensors").stat().st_size
    print(f"wrote {out}: weights of {np.round(size / 1e6, 2)} MB")


def main() -> None:
    """Parse the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=model_path(), help="directory of the model")
    parser.add_argument(
        "--collect", action="store_true", help="first take the text of this Python anew"
    )
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        make(arguments.out, collect=arguments.collect)
    except MlsaeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
