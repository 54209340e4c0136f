"""Analyses of multi-layer SAEs on a trained transformer and on its random variants.

    python -m benchmarks.analysis --model DIR --dataset FILE --out DIR \\
        --json docs/evidence/analysis.json

MODEL is stories260k, a Llama of 260 thousand parameters, in Hugging Face format; the text is 1,000
TinyStories, one {"text": …} a line; the demo transformer comes with the package. Every study is
`mlsae` commands, run in OUT: what was finished before is kept, and `--study` runs one alone. Writes
the JSON that `make results-analysis` makes docs/evidence/analysis.md and its figures from.
"""

import argparse
import datetime
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.analysis_latents import described_latents, heat_map, kinds_of_latents
from benchmarks.analysis_measure import cosines_of_layers, described, similarity
from benchmarks.made import commit, machine
from mlsae.demo import model_path, text_path
from mlsae.models.weights.initialization import INITS
from mlsae.store import open_store

SEEDS = "0,1,2"
SIZE_SEEDS, SIZE_TOKENS = "0,1", "8k"
VALIDATION = "0.1"
EXPANSION_FACTOR, K = "16", "16"


@dataclass(frozen=True)
class Studies:
    """Runs `mlsae` commands in a directory."""

    model: str
    dataset: str
    max_tokens: str | None
    out: Path
    epochs: str
    batch_size: str
    size_rows: str
    demo_tokens: str
    analyzed: str
    """Held-out tokens that are analyzed, at most."""

    def variants(self) -> dict[str, Any]:
        """The trained transformer and its random variants, SAEs of equal settings."""
        found: dict[str, Any] = {"commands": [], "stores": {}, "saes": [], "similarity": []}
        found |= {"heat": {}, "kinds": []}
        for init in INITS:
            cache = f"acts-{init}"
            found["commands"] += [
                self._harvest(init),
                self._train(cache, f"sae-{init}", EXPANSION_FACTOR, K),
            ]
            store = open_store(self.out / cache)
            for sae in self._runs(f"sae-{init}"):
                name, seed = sae["name"], sae["seed"]
                analysis = f"analysis-{init}-{seed}"
                found["commands"] += self._analyze(cache, f"sae-{init}/{name}", analysis)
                folder, about = self.out / analysis, {"init": init, **sae}
                found["saes"].append({**about, **described(folder, store)})
                found["kinds"].append({**about, "groups": kinds_of_latents(folder)})
                found["similarity"].append(
                    {**about, **similarity(folder, self.out / f"sae-{init}" / name, store)}
                )
                if (init, seed) == ("trained", 0):
                    found["latents"] = described_latents(folder, store, Path(self.model))
                if seed == 0:
                    found["heat"][init] = heat_map(folder)
            found["stores"][init] = {
                "store_id": store.store_id,
                "cosine": cosines_of_layers(self.out / f"analysis-{init}-0", store),
            }
        return found

    def sizes(self) -> dict[str, Any]:
        """The trained transformer: other numbers of latents, and of active ones."""
        cache, commands, saes = "acts-trained", [self._harvest("trained")], []
        store = open_store(self.out / cache)
        for out, expansion_factor, k in (
            ("sae-latents", "4,16,64", K),
            ("sae-k", EXPANSION_FACTOR, "4,64"),
        ):
            commands.append(
                self._train(
                    cache, out, expansion_factor, k, "--max-rows", self.size_rows, seeds=SIZE_SEEDS
                )
            )
            for sae in self._runs(out):
                analysis = f"analysis-{out[4:]}-{sae['name']}"
                commands += self._analyze(cache, f"{out}/{sae['name']}", analysis, SIZE_TOKENS)
                saes.append({**sae, **described(self.out / analysis, store)})
        return {"commands": commands, "saes": saes}

    def demo(self) -> dict[str, Any]:
        """The demo transformer with the settings of `mlsae demo`, three seeds of it."""
        harvest = self._run(
            "harvest", "--model", str(model_path()), "--dataset", str(text_path("train")),
            "--max-tokens", self.demo_tokens, "--context-length", "256", "--batch-size", "32",
            "--out", "acts-demo", "--device", "cpu",
        )  # fmt: skip
        train = self._run(
            "train", "--cache", "acts-demo", "--out", "sae-demo", "-R", "16", "-k", "16",
            "--seed", SEEDS, "--batch-size", "4096", "--epochs", "4", "--lr", "1e-3",
            "--validation-fraction", "0.05", "--device", "cpu", "--resume",
        )  # fmt: skip
        store = open_store(self.out / "acts-demo")
        commands, saes, kinds = [harvest, train], [], []
        for sae in self._runs("sae-demo"):
            analysis = f"analysis-demo-{sae['seed']}"
            commands += self._analyze("acts-demo", f"sae-demo/{sae['name']}", analysis)
            folder = self.out / analysis
            saes.append({**sae, **described(folder, store)})
            kinds.append({**sae, "groups": kinds_of_latents(folder)})
        return {
            "commands": commands,
            "store": _about(self.out / "acts-demo"),
            "cosine": cosines_of_layers(self.out / "analysis-demo-0", store),
            "saes": saes,
            "kinds": kinds,
            "heat": heat_map(self.out / "analysis-demo-0"),
        }

    def _harvest(self, init: str) -> str:
        some = () if self.max_tokens is None else ("--max-tokens", self.max_tokens)
        random = () if init == "trained" else ("--init", init)
        return self._run(
            "harvest", "--model", self.model, "--dataset", self.dataset, "--shuffle-seed", "0",
            "--context-length", "256", "--out", f"acts-{init}", "--device", "cpu", *some, *random,
        )  # fmt: skip

    def _train(
        self, cache: str, out: str, expansion_factor: str, k: str, *length: str, seeds: str = SEEDS
    ) -> str:
        return self._run(
            "train", "--cache", cache, "--out", out, "-R", expansion_factor, "-k", k,
            "--seed", seeds, "--batch-size", self.batch_size,
            *(length or ("--epochs", self.epochs)), "--lr", "1e-3",
            "--validation-fraction", VALIDATION, "--device", "cpu", "--resume",
        )  # fmt: skip

    def _analyze(self, cache: str, sae: str, out: str, tokens: str | None = None) -> list[str]:
        return [
            self._run(
                "analyze", "--cache", cache, "--sae", sae, "--max-tokens", tokens or self.analyzed,
                "--out", out, "--device", "cpu",
                finished=(self.out / out / "summary.json").exists(),
            )
        ]  # fmt: skip

    def _run(self, *arguments: str, finished: bool = False) -> str:
        """Runs `mlsae`, unless it has; returns the command as a person would type it."""
        names = {
            self.model: "MODEL",
            self.dataset: "TEXT",
            str(model_path()): "DEMO_MODEL",
            str(text_path("train")): "DEMO_TEXT",
        }
        command = " ".join(("mlsae", *(names.get(word, word) for word in arguments)))
        print(command, flush=True)
        if not finished:
            before = _of_children()
            subprocess.run([sys.executable, "-m", "mlsae", *arguments], cwd=self.out, check=True)
            self._took(command, _of_children() - before)
        return command

    def _took(self, command: str, seconds: float) -> None:
        """Remember the longest run of a command: a second one only finds that all is done."""
        path = self._seconds_of(command)
        known = json.loads(path.read_text()) if path.exists() else 0.0
        path.write_text(json.dumps(max(seconds, known)))

    def _seconds_of(self, command: str) -> Path:
        return self.out / f"seconds-{command.partition(' --out ')[2].split()[0]}.json"

    def seconds(self, commands: Sequence[str]) -> dict[str, float]:
        """CPU seconds of the commands in all, by their first word."""
        found: dict[str, float] = {}
        for command in commands:
            word = command.split()[1]
            found[word] = found.get(word, 0.0) + json.loads(self._seconds_of(command).read_text())
        return {word: round(seconds, 1) for word, seconds in found.items()}

    def _runs(self, out: str) -> list[dict[str, Any]]:
        """The SAEs of a run: name, seed, number of latents, k."""
        saes = json.loads((self.out / out / "summary.json").read_text())["saes"]
        return [{name: sae[name] for name in ("name", "seed", "num_latents", "k")} for sae in saes]


def as_text(content: dict[str, Any]) -> str:
    """JSON with a list of numbers on one line."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    numbers = r"\[\s+([-\d.e+]+(?:,\s+[-\d.e+]+)*)\s+\]"
    return re.sub(numbers, lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def _of_children() -> float:
    """Seconds of the CPU that finished child processes took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _about(directory: Path) -> dict[str, Any]:
    store = open_store(directory)
    return {
        "store_id": store.store_id,
        "encoding": store.encoding,
        "num_tokens": store.num_tokens,
        "num_sequences": store.num_sequences,
        "context_length": store.context_length,
        "layers": list(store.layers),
        "d_model": store.d_model,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="directory of stories260k")
    parser.add_argument("--dataset", required=True, type=Path, help="TinyStories, .jsonl")
    parser.add_argument("--out", required=True, type=Path, help="stores, SAEs and analyses")
    parser.add_argument("--json", required=True, type=Path, help="result")
    parser.add_argument("--study", action="append", help="variants, sizes or demo; else all")
    parser.add_argument("--max-tokens", help="tokens of the text; all if not given")
    parser.add_argument("--epochs", default="2", help="over the text")
    parser.add_argument("--batch-size", default="2048", help="rows a step")
    parser.add_argument("--size-rows", default="1M", help="rows of the other sizes")
    parser.add_argument("--demo-tokens", default="256k", help="tokens of the demo's text")
    parser.add_argument("--analyzed", default="24k", help="held-out tokens, at most")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    studies = Studies(
        model=str(arguments.model.resolve()),
        dataset=str(arguments.dataset.resolve()),
        max_tokens=arguments.max_tokens,
        out=arguments.out,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        size_rows=arguments.size_rows,
        demo_tokens=arguments.demo_tokens,
        analyzed=arguments.analyzed,
    )
    by_name: dict[str, Callable[[], dict[str, Any]]] = {
        "variants": studies.variants,
        "sizes": studies.sizes,
        "demo": studies.demo,
    }
    known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for name in arguments.study or by_name:
        at_commit = commit()
        found = by_name[name]()
        known[name] = {
            "commit": at_commit,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "seconds": studies.seconds(found["commands"]),
            **found,
        }
        known["machine"] = machine()
        if (arguments.out / "acts-trained").exists():
            known["store"] = _about(arguments.out / "acts-trained")
        known["vocab_size"] = AutoConfig.from_pretrained(arguments.model).vocab_size
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(as_text(known))


if __name__ == "__main__":
    main()
