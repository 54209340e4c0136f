"""One training step against the dense product that it cannot do without, and against its peers.

Every contestant runs in a process of its own and takes one step when told, in turn, so that the
machine's changing speed touches all; ratios are of medians. CPU time is told beside wall time: it
is what is left to compare where other programs have the cores, too.

The peers' code is not part of this repository: give the folder of a checkout to have it run, and
`--peer-python` if what it imports lies in another environment. They get the common optimiser,
torch's fused Adam, and, like ours, a C library that keeps freed memory: on a virtual machine fresh
pages would otherwise be half of their time. The product is timed twice: into the same tensor again
and again, and as one writes it, into a fresh one.

    python benchmarks/step.py [--rounds 20] [--threads 2] [--sparsify DIR]
        [--dictionary-learning DIR] [--published DIR] [--peer-python PYTHON]
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHAPES = ((4096, 512, 16384, 32), (4096, 1024, 32768, 64))
"""Rows, channels, latents, k."""
OURS = ("ours float32", "ours bfloat16", "ours bfloat16 dead")
ARCHITECTURES = {
    "ours float32 batchtopk": 1.15,
    "ours float32 matryoshka": 1.3,
    "ours float32 batchtopk matryoshka": 1.3,
}
"""Other architectures, and their figures to reach beside `ours float32`, topk; matryoshka has
four prefixes."""
PRODUCTS = (
    "product float32 reused",
    "product bfloat16 reused",
    "product bfloat16 fresh",
)
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


@dataclass
class Contestant:
    """A process, and what it measured."""

    name: str
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of the process."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended: see its error above")
        if not line.startswith("{"):  # A peer prints that it has no Triton.
            return self.answer()
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def started(
    shape: tuple[int, ...], names: dict[str, str], threads: int, peer_python: str
) -> Iterator[list[Contestant]]:
    """One process for each name; they end with the context."""
    script = str(Path(__file__).with_name("step_contestants.py"))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "5000"}
    made: list[Contestant] = []
    try:
        for name, path in names.items():
            python = peer_python if path else sys.executable
            words = [python, script, name, *map(str, shape), path]
            more = {} if "fresh" in name else KEEP_FREED_MEMORY
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment | more,
            )
            made.append(Contestant(name, process))
            made[-1].answer()
        yield made
    finally:
        for contestant in made:
            contestant.process.terminate()
            contestant.process.wait()


def measure(
    shape: tuple[int, ...], names: dict[str, str], rounds: int, threads: int, peer_python: str
) -> dict[str, Any]:
    """Medians and quartiles in milliseconds, peak memory, and ratios, of one shape."""
    with started(shape, names, threads, peer_python) as contestants:
        for number in range(rounds + 1):
            for contestant in contestants if number % 2 else reversed(contestants):
                answer = contestant.ask("step")
                if number == 0:
                    continue
                contestant.seconds.append(answer["seconds"])
                contestant.cpu_seconds.append(answer["cpu_seconds"])
                for part, seconds in answer["parts"].items():
                    contestant.parts.setdefault(part, []).append(seconds)
        figures: dict[str, Any] = {}
        for contestant in contestants:
            low, middle, high = statistics.quantiles(contestant.seconds, n=4, method="inclusive")
            figures[contestant.name] = {
                "ms": milliseconds(middle),
                "quartiles_ms": [milliseconds(low), milliseconds(high)],
                "fastest_ms": milliseconds(min(contestant.seconds)),
                "cpu_ms": milliseconds(statistics.median(contestant.cpu_seconds)),
                "parts_ms": {
                    part: milliseconds(statistics.median(seconds))
                    for part, seconds in contestant.parts.items()
                },
                "peak_mib": round(contestant.ask("memory")["bytes"] / 2**20),
            }
    rows, d_in, num_latents, k = shape
    result = {"rows": rows, "d_in": d_in, "num_latents": num_latents, "k": k, "figures": figures}
    by = {"ratios": "ms", "ratios_of_cpu_time": "cpu_ms"}
    return result | {name: ratios(figures, key) for name, key in by.items()}


def ratios(figures: dict[str, Any], key: str) -> dict[str, float]:
    """Ours over the products, the peers over ours, and AuxK's share of a step."""

    def ratio(a: str, b: str) -> float:
        return round(float(figures[a][key] / figures[b][key]), 2)

    found = {f"ours bfloat16 / {name}": ratio("ours bfloat16", name) for name in PRODUCTS[1:]}
    found["ours float32 / product float32 reused"] = ratio(OURS[0], PRODUCTS[0])
    found |= {f"{name} / {OURS[0]}": ratio(name, OURS[0]) for name in ARCHITECTURES}
    found["with dead latents / without"] = ratio(OURS[2], OURS[1])
    for name in figures:
        if name not in (*OURS, *PRODUCTS):
            found[f"{name} / ours bfloat16"] = ratio(name, "ours bfloat16")
            found[f"{name} / ours float32"] = ratio(name, "ours float32")
    return found


def milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 1)


def cpu() -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text()
    fields = dict(
        [part.strip() for part in line.split(":", 1)] for line in text.splitlines() if ":" in line
    )
    units = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "model": fields["model name"],
        "flags": [unit for unit in units if unit in fields["flags"].split()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="one more is run and discarded")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sparsify", type=Path, help="a checkout of EleutherAI/sparsify")
    parser.add_argument("--dictionary-learning", type=Path, help="checkout of saprmarks/…")
    parser.add_argument("--published", type=Path, help="checkout of tim-lawson/mlsae")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--shape", type=int, choices=(0, 1), help="only one of the two")
    options = parser.parse_args()
    names = dict.fromkeys((*PRODUCTS, *OURS, *ARCHITECTURES), "")
    if options.sparsify:
        names |= dict.fromkeys(("sparsify", "sparsify bfloat16"), str(options.sparsify))
    if options.dictionary_learning:
        names["dictionary_learning"] = str(options.dictionary_learning)
    if options.published:
        names["mlsae of tim-lawson"] = str(options.published)
    results = []
    for shape in SHAPES if options.shape is None else SHAPES[options.shape : options.shape + 1]:
        results.append(measure(shape, names, options.rounds, options.threads, options.peer_python))
        print(json.dumps(results[-1], indent=2), flush=True)
    summary = {
        "benchmark": "step",
        "wanted": {
            "ours bfloat16 / product": 3.0,
            "sparsify / ours bfloat16": 3.0,
            **{f"{name} / {OURS[0]}": most for name, most in ARCHITECTURES.items()},
        },
        "shapes": results,
        "threads": options.threads,
        "rounds": options.rounds,
        "load": os.getloadavg(),
        "cpu": cpu(),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
