"""Training choices and the SAEs of a real model: four studies.

    python -m benchmarks.training --model DIR --dataset FILE --out DIR \\
        --json docs/evidence/training.json

MODEL is stories260k, a Llama of 260 thousand parameters, in Hugging Face format; the text is 1,000
TinyStories, one {"text": …} a line. Every study is `mlsae` commands, run in OUT: what was finished
before is kept, and `--study` runs one alone. Writes the JSON that `make results-training` makes
docs/evidence/training.md from, and the figures beside it.
"""

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.made import commit, machine
from benchmarks.training_figures import draw
from benchmarks.training_measure import (
    Part,
    check_held_out,
    evaluated,
    penalised,
    split_sequences,
)
from mlsae.store import open_store

CONTEXT_LENGTH = 256
STREAM, MLP = "resid_post", "mlp_out"
EPOCHS = (16, 8, 4, 2, 1)
"""Epochs of the study of unique tokens; the parts of the store are the inverse."""
RATES = "1e-3,3e-3,1e-2"
"""Learning rates that SAEs are compared at the best of."""
MLP_RATES = "3e-3,1e-2,3e-2"


@dataclass(frozen=True)
class Studies:
    """Runs `mlsae` commands in a directory."""

    model: str
    dataset: str
    max_tokens: str | None
    out: Path
    rows: str
    """Rows of the sweep and of the study of layers, as `--max-rows` takes them."""
    mlp_rows: str
    batch_size: int

    def sweep(self) -> dict[str, Any]:
        """FVU against L0: k by expansion factor, each at its best learning rate."""
        command = self._train(
            "sweep", STREAM, "-k", "4,16,64", "-R", "4,16,64", "--lr", RATES,
            "--max-rows", self.rows, "--validation-fraction", "0.05",
        )  # fmt: skip
        return {"commands": [command], **self._summary("sweep")}

    def layers(self) -> dict[str, Any]:
        """One SAE for all layers against one for each, each at its best learning rate."""
        command = self._train(
            "layers", STREAM, "-k", "16", "--num-latents", "256,1280", "--layers", "each",
            "--seed", "0,1", "--lr", RATES, "--max-rows", self.rows,
            "--validation-fraction", "0.05",
        )  # fmt: skip
        return {"commands": [command], **self._summary("layers")}

    def tokens(self) -> dict[str, Any]:
        """Held-out FVU against unique tokens at equal steps.

        From a store of its own, of shuffled stories: those of the file change in kind on the way,
        so that its first part would be of one kind and what is held out of another.
        """
        harvest = self.harvest("shuffled", STREAM, "--shuffle-seed", "0")
        store = open_store(self.out / "shuffled")
        per_part, held_out = split_sequences(store, max(EPOCHS))
        per = store.context_length
        commands = [
            harvest,
            self._copy("held-out", f"{held_out[0] * per}:{held_out[1] * per}"),
            *(self._copy(f"part-{n}", f"0:{per_part * max(EPOCHS) // n * per}") for n in EPOCHS),
        ]
        commands += [self._train_on_part(epochs) for epochs in EPOCHS]
        parts = [
            Part(epochs, self.out / f"part-{epochs}", self.out / f"tokens-{epochs}")
            for epochs in EPOCHS
        ]
        proof = check_held_out(store, self.out / "held-out", held_out, parts)
        return {
            "commands": commands,
            **proof,
            "seconds": sum(self._summary(part.runs.name)["seconds"] for part in parts),
            "saes": [sae for part in parts for sae in evaluated(part, self.out / "held-out")],
        }

    def _train_on_part(self, epochs: int) -> str:
        return self._train(
            f"tokens-{epochs}", STREAM, "-k", "16", "-R", "4,16", "--seed", "0,1", "--lr", "1e-3",
            "--epochs", str(epochs), "--validation-fraction", "0", cache=f"part-{epochs}",
        )  # fmt: skip

    def mlp(self) -> dict[str, Any]:
        """ReLU with L1 on what the MLPs add, by layer scaling."""
        command = self._train(
            "mlp", MLP, "--architecture", "relu", "--normalize", "none",
            "--layer-scale", "none,log,sqrt,linear", "--lr", MLP_RATES,
            "--l1", "0.005,0.01,0.02,0.04", "-R", "4", "--max-rows", self.mlp_rows,
            "--validation-fraction", "0.05",
        )  # fmt: skip
        found = self._summary("mlp")
        store = open_store(self.out / "acts")
        about = {"mean_norms": store.moments(MLP).norm_mean.tolist(), "d_model": store.d_model}
        saes = penalised(store, MLP, self.out / "mlp", [sae["name"] for sae in found["saes"]])
        return {"commands": [command], **found, **about, "saes": saes}

    def _train(self, name: str, site: str, *arguments: str, cache: str = "acts") -> str:
        return self.run(
            "train", "--cache", cache, "--site", site, "--out", name, *arguments,
            "--batch-size", str(self.batch_size), "--device", "cpu", "--resume",
        )  # fmt: skip

    def _copy(self, name: str, rows: str) -> str:
        return self.run("store", "copy", "shuffled", name, "--rows", rows)

    def harvest(self, name: str, sites: str, *arguments: str) -> str:
        """The text's activations."""
        some = () if self.max_tokens is None else ("--max-tokens", self.max_tokens)
        return self.run(
            "harvest", "--model", self.model, "--dataset", self.dataset, "--sites", sites,
            "--context-length", str(CONTEXT_LENGTH), "--out", name, "--device", "cpu",
            *some, *arguments,
        )  # fmt: skip

    def run(self, *arguments: str) -> str:
        """Runs `mlsae`; returns the command as a person would type it.

        A sweep of which some SAEs diverged ends with an error, and has the others.
        """
        names = {self.model: "MODEL", self.dataset: "TEXT"}
        command = " ".join(("mlsae", *(names.get(word, word) for word in arguments)))
        print(command, flush=True)
        done = subprocess.run([sys.executable, "-m", "mlsae", *arguments], cwd=self.out)
        has_others = (
            "--out" in arguments
            and (self.out / arguments[arguments.index("--out") + 1] / "summary.json").exists()
        )
        if not has_others:
            done.check_returncode()
        return command

    def _summary(self, name: str) -> dict[str, Any]:
        folder = self.out / name
        saes = json.loads((folder / "summary.json").read_text())["saes"]
        record = json.loads((folder / saes[0]["name"] / "training.json").read_text())
        return {
            "seconds": record["environment"]["last_session_seconds"],
            "threads": record["environment"]["threads"],
            "num_steps": record["settings"]["num_steps"],
            "num_rows": record["settings"]["num_rows"],
            "num_held_out": record["validation"]["num_held_out"],
            "saes": saes,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="directory of stories260k")
    parser.add_argument("--dataset", required=True, type=Path, help="TinyStories, .jsonl")
    parser.add_argument("--out", required=True, type=Path, help="store and SAEs")
    parser.add_argument("--json", required=True, type=Path, help="result, with figures beside it")
    parser.add_argument("--study", action="append", help="sweep, layers, tokens or mlp; else all")
    parser.add_argument("--max-tokens", help="tokens of the text; all if not given")
    parser.add_argument("--rows", default="600k", help="rows of the sweep and the study of layers")
    parser.add_argument("--mlp-rows", default="600k", help="rows of the study of MLP outputs")
    parser.add_argument("--batch-size", default=1024, type=int, help="rows a step")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    studies = Studies(
        model=str(arguments.model.resolve()),
        dataset=str(arguments.dataset.resolve()),
        max_tokens=arguments.max_tokens,
        out=arguments.out,
        rows=arguments.rows,
        mlp_rows=arguments.mlp_rows,
        batch_size=arguments.batch_size,
    )
    by_name: dict[str, Callable[[], dict[str, Any]]] = {
        "sweep": studies.sweep,
        "layers": studies.layers,
        "tokens": studies.tokens,
        "mlp": studies.mlp,
    }
    studies.harvest("acts", f"{STREAM},{MLP}")
    store = open_store(arguments.out / "acts")
    known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for name in arguments.study or by_name:
        at_commit = commit()
        known[name] = {
            "commit": at_commit,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "batch_size": arguments.batch_size,
            **by_name[name](),
        }
        known[name]["machine"] = machine()
        known["store"] = known[name]["store"] = {
            "store_id": store.store_id,
            "encoding": store.encoding,
            "num_tokens": store.num_tokens,
            "num_sequences": store.num_sequences,
            "context_length": store.context_length,
            "layers": list(store.layers),
            "d_model": store.d_model,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(known, indent=1) + "\n")
        draw(name, known[name], arguments.json.with_suffix(""))


if __name__ == "__main__":
    main()
