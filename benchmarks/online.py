"""Training from a store against online training, which runs the transformer for each batch.

The peer is tim-lawson/mlsae as it is: its LightningModule in Lightning's Trainer, on a transformer
of Pythia-70m's shape with random weights. Ours trains from a store of the same transformer's
activations, and from batches that lie in memory. Shapes are equal: latents, k, rows of a step
(tokens × layers), context length; so are the threads, and a C library that keeps freed memory.

Contestants take turns, each in a process of its own. One whose turn it is not is stopped by signal,
so that no thread of it reads ahead for nothing. A ratio is of medians over rounds, the first of
which is discarded.

    python -m benchmarks.online [--rounds 7] [--threads 2] [--dir DISK]
        [--published DIR] [--peer-python PYTHON]
"""

import argparse
import contextlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models

from benchmarks.made import machine
from benchmarks.step import KEEP_FREED_MEMORY, Contestant, cpu, milliseconds
from mlsae.harvest import HarvestConfig
from mlsae.harvest import run as harvest

ROOT = Path(__file__).resolve().parents[1]
D_IN, NUM_LAYERS, VOCABULARY, CONTEXT_LENGTH = 512, 6, 50_304, 2048
NUM_TOKENS = 65_536
COMMON = {"num_latents": 16_384, "k": 32, "lr": 1e-4}
ONLINE_ROWS, MEMORY_ROWS = CONTEXT_LENGTH * NUM_LAYERS, 4096
"""One sequence at all layers, the peer's own batch; and ours alone."""
PRECISIONS = ("float32", "bfloat16")
"""Precisions of ours; the peer knows one on a CPU."""


def make_model(path: Path) -> None:
    """A GPT-NeoX of Pythia-70m's shape with random weights, and a tokenizer of one special token.

    Written in the older names of its settings, which old and new transformers read.
    """
    settings = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": D_IN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT_LENGTH,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    path.mkdir()
    config_file = path / "config.json"
    config_file.write_text(json.dumps(settings))
    config = transformers.AutoConfig.from_pretrained(path)
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(path)
    config_file.write_text(json.dumps(settings))
    (path / "generation_config.json").unlink(missing_ok=True)
    end = "<|endoftext|>"
    words = {end: 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token=end)).save(str(path / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end}
    (path / "tokenizer_config.json").write_text(json.dumps(described))


def make_store(model: Path, path: Path) -> None:
    """Activations of random tokens at all layers, in float16."""
    ids = torch.randint(1, VOCABULARY, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    dataset = path.with_suffix(".jsonl")
    dataset.write_text(json.dumps({"ids": ids.tolist()}))
    with contextlib.redirect_stdout(io.StringIO()):
        harvest(
            HarvestConfig(
                model=str(model),
                dataset=str(dataset),
                tokens_column="ids",
                context_length=CONTEXT_LENGTH,
                batch_size=2,
                out=path,
            )
        )


@contextlib.contextmanager
def started(contestants: dict[str, dict[str, Any]], threads: int) -> Iterator[list[Contestant]]:
    """One stopped process for each; they end with the context."""
    environment = os.environ | KEEP_FREED_MEMORY
    environment |= {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "5000"}
    made: list[Contestant] = []
    try:
        for name, settings in contestants.items():
            process = subprocess.Popen(
                [
                    settings.get("python", sys.executable),
                    "-m",
                    "benchmarks.online_contestants",
                    json.dumps(settings),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=ROOT,
            )
            made.append(Contestant(name, process))
            made[-1].parts = made[-1].answer()["parts"]
            process.send_signal(signal.SIGSTOP)
        yield made
    finally:
        for contestant in made:
            contestant.process.kill()
            contestant.process.wait()


def measure(
    rows: int, contestants: dict[str, dict[str, Any]], rounds: int, threads: int
) -> dict[str, Any]:
    """Medians and quartiles of rows a second, and CPU seconds, of each."""
    with started(contestants, threads) as running:
        for number in range(rounds):
            for contestant in running[:: -1 if number % 2 else 1]:
                steps = contestants[contestant.name]["steps"]
                contestant.process.send_signal(signal.SIGCONT)
                answer = contestant.ask(str(steps))
                contestant.process.send_signal(signal.SIGSTOP)
                if number > 0:
                    contestant.seconds.append(answer["seconds"] / steps)
                    contestant.cpu_seconds.append(answer["cpu_seconds"] / steps)
    figures = {}
    for contestant in running:
        low, middle, high = statistics.quantiles(contestant.seconds, n=4, method="inclusive")
        figures[contestant.name] = {
            "rows_per_second": round(rows / middle),
            "quartiles": [round(rows / high), round(rows / low)],
            "step_seconds": round(middle, 3),
            "step_cpu_seconds": round(statistics.median(contestant.cpu_seconds), 3),
            **{f"{part}_cpu_ms": milliseconds(s) for part, (s,) in contestant.parts.items()},
        }
    return {"rows": rows, "figures": figures, "load": os.getloadavg()}


def against_online(
    store: Path, model: Path, options: argparse.Namespace, rounds: int
) -> dict[str, Any]:
    """Ours in both precisions against the peer.

    As it is, and made as light as its code allows: one AuxK latent (it does not run without any),
    and torch not in its deterministic mode, which also fills all fresh memory.
    """
    peer = COMMON | {
        "published": str(options.published.resolve()),
        "python": options.peer_python,
        "model": str(model),
        "d_in": D_IN,
        "vocabulary": VOCABULARY,
        "context_length": CONTEXT_LENGTH,
        "sequences": 1,
        "steps": 1,
    }
    contestants: dict[str, dict[str, Any]] = {
        f"ours {precision}": from_store(store, ONLINE_ROWS, precision, 2)
        for precision in PRECISIONS
    }
    contestants["online"] = peer | {"auxk": 256, "deterministic": True}
    contestants["online, at its least"] = peer | {"auxk": 1, "deterministic": False}
    result = measure(ONLINE_ROWS, contestants, rounds, options.threads)
    figures = result["figures"]
    for key, name in (("step_seconds", "ratios"), ("step_cpu_seconds", "ratios_of_cpu_time")):
        result[name] = {
            f"{peer_name} / {our_name}": round(figures[peer_name][key] / figures[our_name][key], 2)
            for peer_name in figures
            if peer_name.startswith("online")
            for our_name in figures
            if our_name.startswith("ours")
        }
    return result


def against_memory(store: Path, options: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """Equal steps from the store and from memory."""
    contestants: dict[str, dict[str, Any]] = {}
    for precision in PRECISIONS:
        for place in ("store", "memory"):
            settings = from_store(store, MEMORY_ROWS, precision, 4)
            settings["in_memory"] = place == "memory"
            contestants[f"{place} {precision}"] = settings
    result = measure(MEMORY_ROWS, contestants, rounds, options.threads)
    figures = result["figures"]
    for key, name in (("step_seconds", "ratios"), ("step_cpu_seconds", "ratios_of_cpu_time")):
        result[name] = {
            precision: round(
                figures[f"memory {precision}"][key] / figures[f"store {precision}"][key], 3
            )
            for precision in PRECISIONS
        }
    return result


def from_store(store: Path, rows: int, precision: str, steps: int) -> dict[str, Any]:
    return COMMON | {
        "store": str(store),
        "rows": rows,
        "precision": precision,
        "steps": steps,
        "in_memory": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="the first is discarded")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dir", type=Path, help="where a store of 0.4 GB is put meanwhile")
    parser.add_argument("--published", type=Path, help="a checkout of tim-lawson/mlsae")
    parser.add_argument("--peer-python", default=sys.executable, help="with what it imports")
    options = parser.parse_args()
    summary: dict[str, Any] = {"benchmark": "online", "wanted": {"online": 5.0, "memory": 0.95}}
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        model, store = Path(temporary) / "model", Path(temporary) / "acts"
        make_model(model)
        make_store(model, store)
        if options.published:
            summary["online"] = against_online(store, model, options, options.rounds)
            print(json.dumps(summary["online"], indent=2), flush=True)
        summary["memory"] = against_memory(store, options, options.rounds)
        print(json.dumps(summary["memory"], indent=2), flush=True)
    summary |= {"rounds": options.rounds - 1, "threads": options.threads}
    print(json.dumps(summary | {"machine": machine(), "cpu": cpu()}))


if __name__ == "__main__":
    main()
