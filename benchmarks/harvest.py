"""The harvest against what bounds it: the bare backbone forward, and the disk.

Each round runs, on the same batches, (1) the backbone alone, as transformers runs it, (2) the
harvest's own loop from the first batch to the last committed shard, (3) the usual way,
`AutoModelForCausalLM` with `output_hidden_states=True`; and writes the same bytes with
`numpy.tofile` and `fsync`. Rounds alternate; figures are ratios of medians, the first round
discarded. The process keeps freed memory, as `mlsae harvest` does on a CPU, whichever of the four
runs. The page cache is filled first (--ballast), buffers are reused, no output is deleted before
the end, and system CPU time is printed, because on a virtual machine that hands freed memory back
to its host the price of fresh pages can hide everything else. Packing, loading and the preflight
batch are outside: they do not grow with the tokens, or are paid once.

    python -m benchmarks.harvest [--rounds 5] [--threads 2] [--sizes 512x6,1024x8]
        [--dir DISK] [--ballast 8GB]
"""

import argparse
import json
import os
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
import transformers

from benchmarks.page_cache import fill_page_cache
from mlsae.base.interruption import interruptible
from mlsae.base.machine.heap import keep_freed_memory
from mlsae.base.ranks import Ranks
from mlsae.base.units import parse_bytes
from mlsae.harvest.compute.batches import Batches
from mlsae.harvest.compute.calibrate import calibrate
from mlsae.harvest.pipeline import keeps_cached
from mlsae.harvest.shards import harvest_shards
from mlsae.models import load
from mlsae.store import Writer, create
from mlsae.store.format.encoding import check_encoding, parts_of

CONTEXT = 512
BATCH = 16


@dataclass(frozen=True)
class Size:
    """A GPT-NeoX model with random weights, and the tokens of a round."""

    d_model: int
    num_layers: int
    tokens: int


SIZES = {
    "512x6": Size(512, 6, 8 * BATCH * CONTEXT),
    "1024x8": Size(1024, 8, 3 * BATCH * CONTEXT),
}
"""The first is Pythia-70m's."""


def make_model(size: Size, dtype: str, path: Path) -> None:
    """Save a random model."""
    config = transformers.GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=size.d_model,
        num_hidden_layers=size.num_layers,
        num_attention_heads=8,
        intermediate_size=4 * size.d_model,
        max_position_embeddings=2048,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto_class: Any = transformers.AutoModelForCausalLM
        model = auto_class.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(path)


class Rounds:
    """The four ways over the same tokens."""

    def __init__(self, size: Size, dtype: str, encoding: str, work: Path) -> None:
        make_model(size, dtype, work / "model")
        self.model = load(work / "model")
        self.bare = load(work / "model", attention_implementation="sdpa").model
        self.size, self.encoding, self.work = size, encoding, work
        self.tokens = np.random.default_rng(0).integers(0, 50_000, size.tokens, dtype=np.uint32)
        self.turn = 0
        self.batches = Batches(
            tokens=lambda start, stop: self.tokens[start:stop],
            documents=None,
            token_flags=None,
            context_length=CONTEXT,
            batch_sequences=BATCH,
        )
        self.inputs = [
            self.batches.batch(start, BATCH) for start in range(0, size.tokens // CONTEXT, BATCH)
        ]
        self.calibration = None
        if encoding == "int8":
            flags = np.zeros(size.tokens, np.uint8)
            self.calibration = calibrate(
                self.model, self.batches, flags, range(size.num_layers), ("resid_post",)
            )
        row_bytes = sum(part.row_bytes for part in parts_of(check_encoding(encoding), size.d_model))
        self.num_bytes = size.tokens * row_bytes * size.num_layers
        rng = np.random.default_rng(1)
        self.noise = rng.integers(0, 255, self.num_bytes // size.num_layers, dtype=np.uint8)

    def _writer(self, path: Path) -> Writer:
        return create(
            path,
            tokens=self.tokens,
            context_length=CONTEXT,
            layers=range(self.size.num_layers),
            d_model=self.size.d_model,
            encoding=self.encoding,
            calibration=self.calibration,
            batch_sequences=BATCH,
            source={"packing": {"packing": "concatenate", "isolate_documents": False}},
            cached=keeps_cached(self.model),
        )

    def _directory(self, name: str) -> Path:
        self.turn += 1
        path = self.work / f"{name}{self.turn}"
        path.mkdir()
        return path

    def backbone(self) -> None:
        """The forward pass alone, with the attention that transformers would choose."""
        self._forward(self.bare.base_model, use_cache=False)

    def hidden_states(self) -> None:
        """The usual way to the same tensors, which stores nothing."""
        self._forward(self.bare, output_hidden_states=True)

    @torch.inference_mode()
    def _forward(self, module: Any, **how: bool) -> None:
        for batch in self.inputs:
            module(input_ids=batch.inputs.tokens.to(self.model.device), **how)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def prepare(self) -> None:
        """A store whose tokens are written."""
        self.writer = self._writer(self._directory("acts"))

    def harvest(self) -> None:
        """Every shard computed and committed."""
        with interruptible() as interruption, self.writer as writer:
            harvest_shards(self.model, writer, self.batches, Ranks(0, 1), interruption)

    def disk(self) -> None:
        """Equal bytes to that disk, durably, with nothing else."""
        path = self._directory("raw")
        for layer in range(self.size.num_layers):
            with (path / str(layer)).open("wb") as file:
                self.noise.tofile(file)
                file.flush()
                os.fsync(file.fileno())


def timed(work: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds of the wall, of CPU time, and of the system's part of it."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    work()
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    return wall, after.ru_utime - before.ru_utime + system, system


def measure(name: str, dtype: str, encoding: str, num_rounds: int, parent: Path) -> dict[str, Any]:
    """All rounds of one model and precision."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        rounds = Rounds(size, dtype, encoding, Path(directory))
        seconds: dict[str, list[float]] = {}
        cpu: dict[str, list[float]] = {}
        system: dict[str, list[float]] = {}
        for _ in range(num_rounds + 1):
            rounds.prepare()
            for way in (rounds.backbone, rounds.harvest, rounds.hidden_states, rounds.disk):
                wall, of_cpu, of_system = timed(way)
                seconds.setdefault(way.__name__, []).append(wall)
                cpu.setdefault(way.__name__, []).append(of_cpu)
                system.setdefault(way.__name__, []).append(of_system)
        device = rounds.model.device
    median = {way: statistics.median(values[1:]) for way, values in seconds.items()}
    bound = max(("backbone", "disk"), key=lambda way: median[way])
    in_turn = zip(*(seconds[way][1:] for way in ("harvest", "backbone", "disk")), strict=True)
    ratios = [harvest / max(backbone, disk) for harvest, backbone, disk in in_turn]
    return {
        "model": {"name": name, **asdict(size)},
        "dtype": dtype,
        "encoding": encoding,
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "seconds": {way: round(value, 3) for way, value in median.items()},
        "cpu": {way: round(statistics.median(v[1:]), 3) for way, v in cpu.items()},
        "system_cpu": {way: round(statistics.median(v[1:]), 3) for way, v in system.items()},
        "tokens_per_second": round(size.tokens / median["harvest"]),
        "megabytes_per_second": round(rounds.num_bytes / median["harvest"] / 1e6),
        "bound": "forward" if bound == "backbone" else "disk",
        "harvest_over_bound": round(median["harvest"] / median[bound], 3),
        "harvest_over_bound_rounds": [round(ratio, 3) for ratio in ratios],
        "speed_over_hidden_states": round(median["hidden_states"] / median["harvest"], 2),
    }


def cases(sizes: str) -> Iterator[tuple[str, str, str]]:
    """Model, precision of the model, encoding."""
    for name in sizes.split(","):
        yield name, "float32", "float16"
        yield name, "bfloat16", "bfloat16"
        yield name, "bfloat16", "int8"


def main() -> None:
    """Print a line a case, and last one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--dir", type=Path, help="where to write; a temporary directory if absent")
    parser.add_argument("--ballast", type=parse_bytes, default=parse_bytes("8GB"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    if arguments.dir is not None:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        if arguments.ballast:
            fill_page_cache(Path(directory) / "ballast", arguments.ballast)
        found = measure_all(arguments, Path(directory))
    print(
        json.dumps(
            {
                "benchmark": "harvest",
                "threads": arguments.threads,
                "torch": torch.__version__,
                "cpu": platform.processor() or platform.machine(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "results": found,
            }
        )
    )


def measure_all(arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Every case, a line printed for each."""
    found = []
    for case in cases(arguments.sizes):
        result = measure(*case, arguments.rounds, directory)
        found.append(result)
        print(
            f"{result['model']['name']} {result['dtype']} → {result['encoding']}: "
            f"{result['tokens_per_second']:,} tokens/s, {result['harvest_over_bound']} × the "
            f"{result['bound']} bound, {result['speed_over_hidden_states']} × the speed of "
            f"output_hidden_states; seconds {result['seconds']}; CPU {result['cpu']}; "
            f"of the system {result['system_cpu']}; load {os.getloadavg()[0]:.1f}"
        )
    return found


if __name__ == "__main__":
    main()
