"""Finding each latent's examples, against encoding alone and the original's code.

Contenders take the same rows of all layers in turn, round after round: `examples` encodes them and
keeps the strongest and random events of every latent with their windows; `encode only` encodes them
in batches of the same size; `original` is `get_examples` and `insert_examples` of tim-lawson/mlsae
as they are, in a process of its own, with the same weights, its transformer's outputs replaced by
the stored activations, on as many rows of them as it can do in the time: its own encoder, a Python
row for each event, SQLite. Its deletions, every tenth batch, are timed apart and left out. Examples
pile up from round to round, as in a long pass. In the end the whole `mlsae analyze` runs once.

    python -m benchmarks.analyze [--rounds 5] [--threads 2] [--original DIR]
        [--peer-python PYTHON] [--shape NAME]
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.made import commit, machine
from benchmarks.rounds import Contender, alternate
from mlsae.analyze import AnalyzeConfig, run
from mlsae.analyze.examples.collect import Examples, ExamplesPlan
from mlsae.analyze.examples.table import write_examples
from mlsae.analyze.pairing import Pairing, pair
from mlsae.analyze.results.tables import schema
from mlsae.analyze.selection import Int, read_rows
from mlsae.demo import model_path
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.store import create, open_store

CONTEXT_LENGTH = 256
BATCH_ROWS = 4096
PLAN = ExamplesPlan(top=16, samples=4, before=8, after=4, seed=0)
WANTED = {"examples / encode only": 0.5, "examples / original": 20.0}


@dataclass(frozen=True)
class Shape:
    """Shape of the store and the SAE."""

    num_layers: int
    d_model: int
    num_latents: int
    k: int
    sequences: int
    """Tokens of a round of ours."""
    original_sequences: int
    """Tokens of a round of the original's."""


SHAPES = {
    "pythia-70m": Shape(6, 512, 16_384, 32, sequences=32, original_sequences=1),
    "stories260k": Shape(5, 64, 4096, 32, sequences=128, original_sequences=1),
}


def make_pairing(place: Path, shape: Shape, rounds: int) -> Pairing:
    """Random activations, tokens and documents; an SAE that has not been trained."""
    generator = np.random.default_rng(0)
    num_tokens = shape.sequences * CONTEXT_LENGTH * rounds
    scale = np.exp(0.5 * generator.standard_normal(shape.d_model, np.float32))
    with create(
        place / "acts",
        tokens=generator.integers(0, 512, num_tokens),
        documents=np.cumsum(generator.random(num_tokens) < 1 / 300),
        context_length=CONTEXT_LENGTH,
        layers=range(shape.num_layers),
        d_model=shape.d_model,
        batch_sequences=shape.sequences,
    ) as writer:
        for _ in range(rounds):
            rows = shape.sequences * CONTEXT_LENGTH, shape.d_model
            writer.append(
                {
                    ("resid_post", layer): (
                        generator.standard_normal(rows, np.float32) * scale
                    ).astype(np.float16)
                    for layer in range(shape.num_layers)
                }
            )
    store = open_store(place / "acts")
    config = SAEConfig(
        d_in=shape.d_model, num_latents=shape.num_latents, architecture=TopK(shape.k)
    )
    SAE(config, torch.Generator().manual_seed(0)).save(
        place / "sae",
        {
            "store_id": store.store_id,
            "stores": [{"store_id": store.store_id, "tokens_sha256": store.plan.tokens_sha256}],
            "model_fingerprint": None,
            "site": "resid_post",
            "layers": list(store.layers),
            "skip_positions": 1,
            "validation": {"fraction": 0.0, "seed": 0},
        },
    )
    return pair(place / "acts", place / "sae", torch.device("cpu"))


class Turns:
    """The sequences of one round after another, for each contender by itself."""

    def __init__(self, shape: Shape) -> None:
        self._per_round = shape.sequences
        self._next = 0

    def next(self) -> Int:
        """Tokens of the next round."""
        first = self._next
        self._next += self._per_round
        return np.arange(first, self._next)


@torch.no_grad()
def encoded(
    pairing: Pairing, sequences: Int
) -> Iterator[tuple[Int, Int, dict[int, tuple[torch.Tensor, torch.Tensor]]]]:
    """Eligible rows of each batch, their tokens, and layer → values and indices of latents."""
    readers = {
        layer: read_rows(pairing.store, pairing.site, layer, sequences, BATCH_ROWS)
        for layer in pairing.layers
    }
    while True:
        latents = {}
        for layer, reader in readers.items():
            if (batch := next(reader, None)) is None:
                return
            rows, tokens, x = batch
            eligible = tokens % CONTEXT_LENGTH >= pairing.skip_positions
            of = pairing.sae.encode(torch.from_numpy(x[eligible]), layer)
            latents[layer] = of.values, of.indices
        yield rows[eligible], tokens[eligible], latents


def finder(pairing: Pairing, shape: Shape) -> tuple[Examples, Contender]:
    """Ours."""
    examples, turns = Examples(pairing, PLAN), Turns(shape)

    def work() -> int:
        done = 0
        for rows, tokens, latents in encoded(pairing, turns.next()):
            examples.add(rows, tokens, latents)
            done += len(rows)
        examples.finish()
        return done

    return examples, Contender("examples", work)


def encoder(pairing: Pairing, shape: Shape) -> Contender:
    """Reads and encodes, and nothing else."""
    turns = Turns(shape)

    def work() -> int:
        return sum(len(rows) for rows, _, _ in encoded(pairing, turns.next()))

    return Contender("encode only", work)


@contextlib.contextmanager
def original(
    checkout: Path, python: str, pairing: Pairing, shape: Shape, place: Path, threads: int
) -> Iterator[tuple[Contender, subprocess.Popen[str]]]:
    """The original's, told when to take a step."""
    num_tokens = shape.original_sequences * CONTEXT_LENGTH
    store, sae = pairing.store, pairing.sae
    np.savez(
        place / "original.npz",
        tokens=store.tokens(0, num_tokens).reshape(-1, CONTEXT_LENGTH).astype(np.int64),
        activations=np.stack(
            [store.read(pairing.site, layer, 0, num_tokens) for layer in pairing.layers]
        ).reshape(shape.num_layers, -1, CONTEXT_LENGTH, shape.d_model),
        encoder=sae.W_enc.detach().numpy(),
        bias=sae.b.detach().numpy(),
    )
    script = Path(__file__).with_name("analyze_original.py")
    process = subprocess.Popen(
        [
            python, str(script), str(checkout), str(place / "original.npz"), str(shape.k),
            str(model_path()), str(place / "original.db"), str(PLAN.top), str(threads),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield Contender("original", lambda: int(ask(process, "step")["tokens"])), process
    finally:
        process.terminate()
        process.wait()


def ask(process: subprocess.Popen[str], command: str) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(command + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def measure(shape: Shape, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Tokens a second, which are rows of every layer, and ratios."""
    pairing = make_pairing(place, shape, options.rounds + 1)
    examples, ours = finder(pairing, shape)
    contenders = [ours, encoder(pairing, shape)]
    more: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        process = None
        if options.original is not None:
            contender, process = stack.enter_context(
                original(
                    options.original, options.peer_python, pairing, shape, place, options.threads
                )
            )
            contenders.append(contender)
        alternate(contenders, options.rounds + 1)
        if process is not None:
            more["original's deletion"] = ask(process, "delete")
    began = time.perf_counter()
    path = place / "examples.parquet"
    num_rows = write_examples(path, schema("examples", {}), examples, None, lambda _: None)
    more["table"] = {
        "rows": num_rows,
        "seconds": round(time.perf_counter() - began, 2),
        "bytes_per_row": round(path.stat().st_size / num_rows, 1),
    }
    speeds = {contender.name: contender.speed for contender in contenders}
    ratios = {
        f"examples / {name}": round(speeds["examples"] / speed, 2)
        for name, speed in speeds.items()
        if name != "examples"
    }
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run(AnalyzeConfig(
            cache=place / "acts", sae=place / "sae", out=place / "out", rows="all",
            max_tokens=shape.sequences * CONTEXT_LENGTH, device="cpu",
        ))  # fmt: skip
    seconds = time.perf_counter() - began
    more["mlsae analyze"] = {
        "tokens": shape.sequences * CONTEXT_LENGTH,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(shape.sequences * CONTEXT_LENGTH / seconds),
    }
    return {
        "tokens_per_second": {
            # A row a round counts once a layer.
            contender.name: contender.result()
            for contender in contenders
        },
        "ratios": ratios,
        "state_bytes": PLAN.num_bytes(shape.num_latents, shape.num_layers),
        **more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="one more is run and discarded")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--original", type=Path, help="a checkout of tim-lawson/mlsae")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="not all of them")
    parser.add_argument("--dir", type=Path, help="where stores are made")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    for name in options.shape or SHAPES:
        with tempfile.TemporaryDirectory(dir=options.dir) as place:
            results[name] = measure(SHAPES[name], options, Path(place))
        print(name, json.dumps(results[name], indent=2), flush=True)
    summary = {
        "benchmark": "analyze",
        "commit": commit(),
        "machine": machine(),
        "wanted": WANTED,
        "shapes": results,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
