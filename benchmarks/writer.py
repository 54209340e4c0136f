"""The store's writer against `numpy.tofile` + `fsync` of the same bytes to the same disk.

The writer's time is a whole store's: plan, tokens, checksums of every chunk, SHA-256 of every
object, fsync and rename, moments merged, completion. The peer writes as many files of the same
size. Rounds alternate; a ratio is of medians over rounds, the first of which is discarded.

On a virtual machine that hands freed memory back to its host, fresh pages cost more than the disk.
So the page cache is filled first (--ballast), rows come from buffers that are used again and again,
old outputs are removed outside the timed part and only when newer ones have taken their place, and
system CPU time is printed.

    python -m benchmarks.writer --dir DISK [--rounds 7] [--ballast 17GB]
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.page_cache import fill_page_cache
from mlsae.base.files import fsync_directory
from mlsae.base.units import parse_bytes
from mlsae.store import GroupMoments, create
from mlsae.store.format.accumulate import Accumulator
from mlsae.store.format.encoding import SiteCodec
from mlsae.store.format.moments import group_of_rows

SITE = "resid_post"
CONTEXT_LENGTH = 256
BATCH_SEQUENCES = 64
RING = 3
"""Sets of buffers that a producer uses in turn."""
KEPT_OUTPUTS = 12
Rows = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Shape:
    """Shape of the store."""

    d_model: int
    num_rows: int = 262_144
    num_layers: int = 6

    @property
    def num_bytes(self) -> int:
        """Bytes of activations."""
        return self.num_layers * self.num_rows * self.d_model * 2


class Producer:
    """A ring of batches, as a harvest would hand them over, and their moments."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        generator = np.random.default_rng(0)
        self.batch_rows = CONTEXT_LENGTH * BATCH_SEQUENCES
        self.ring: list[dict[tuple[str, int], Rows]] = []
        self.moments: list[GroupMoments] = []
        layers = tuple(range(shape.num_layers))
        positions = np.arange(self.batch_rows) % CONTEXT_LENGTH
        groups = group_of_rows(np.zeros(self.batch_rows, np.uint8), positions)
        for _ in range(RING):
            batch = {}
            for layer in layers:
                values = generator.standard_normal((self.batch_rows, shape.d_model), np.float32)
                batch[SITE, layer] = values.astype(np.float16)
            total = Accumulator(layers, shape.d_model, SiteCodec("float16", shape.d_model))
            total.add(groups, [(rows,) for rows in batch.values()])
            self.ring.append(batch)
            self.moments.append(total)

    def tofile(self, path: Path) -> None:
        """The peer: one file for each object that the store has, from the same buffers."""
        path.mkdir()
        shard_rows = 2**27 // (2 * self.shape.d_model)
        for layer in range(self.shape.num_layers):
            for start in range(0, self.shape.num_rows, shard_rows):
                with (path / f"{layer}-{start}").open("wb") as file:
                    for first in range(start, start + shard_rows, self.batch_rows):
                        ring = self.ring[first // self.batch_rows % RING]
                        ring[SITE, layer].tofile(file)
                    file.flush()
                    os.fsync(file.fileno())
        fsync_directory(path)

    def store(self, path: Path, *, moments_given: bool, num_rows: int | None = None) -> int:
        """Ours; the most anonymous and shared memory seen, in bytes."""
        most = 0
        with create(
            path,
            tokens=np.zeros(num_rows or self.shape.num_rows, np.uint32),
            context_length=CONTEXT_LENGTH,
            layers=range(self.shape.num_layers),
            d_model=self.shape.d_model,
            batch_sequences=BATCH_SEQUENCES,
        ) as writer:
            of_shard = self._no_moments()
            while (row := writer.position) is not None:
                i = row // self.batch_rows % RING
                if moments_given:
                    writer.write(self.ring[i], moments_follow=True)
                    of_shard.merge(self.moments[i])
                    if writer.position == writer.shard_range(row // writer.shard_rows).stop:
                        writer.end_shard({SITE: of_shard})
                        of_shard = self._no_moments()
                else:
                    writer.append(self.ring[i])
                most = max(most, anonymous_memory())
        return most

    def _no_moments(self) -> GroupMoments:
        return GroupMoments(tuple(range(self.shape.num_layers)), self.shape.d_model)


def anonymous_memory() -> int:
    """RssAnon + RssShmem of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return 1024 * (int(sizes["RssAnon"]) + int(sizes["RssShmem"]))


class Outputs:
    """Fresh directories; the oldest goes when there are many, before the clock runs."""

    def __init__(self, parent: Path, num_kept: int) -> None:
        self._parent = parent
        self._num_kept = num_kept
        self._made: list[Path] = []
        self._count = 0

    def new(self) -> Path:
        """A directory that is not there yet."""
        while len(self._made) >= self._num_kept:
            shutil.rmtree(self._made.pop(0))
        self._count += 1
        self._made.append(self._parent / f"out-{self._count}")
        return self._made[-1]


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time and of system CPU time; nothing is left to be flushed before."""
    os.sync()
    system = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_stime - system


def measure(shape: Shape, parent: Path, rounds: int) -> dict[str, Any]:
    producer = Producer(shape)
    outputs = Outputs(parent, max(3, KEPT_OUTPUTS * 512 // shape.d_model))
    works: dict[str, Callable[[Path], object]] = {
        "tofile": producer.tofile,
        "moments_given": lambda path: producer.store(path, moments_given=True),
        "moments_here": lambda path: producer.store(path, moments_given=False),
    }
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for number in range(rounds):
        for name in sorted(works, reverse=number % 2 == 1):
            path = outputs.new()
            figures[name].append(timed(partial(works[name], path)))
    result: dict[str, Any] = {**asdict(shape), "num_bytes": shape.num_bytes}
    for name, measured in figures.items():
        speeds = [shape.num_bytes / seconds / 1e9 for seconds, _ in measured[1:]]
        low, middle, high = statistics.quantiles(speeds, n=4, method="inclusive")
        result[name] = {
            "gb_per_second": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "system_cpu_seconds": round(statistics.median(s for _, s in measured[1:]), 2),
        }
    base = result["tofile"]["gb_per_second"]
    for name in ("moments_given", "moments_here"):
        result[name]["ratio"] = round(result[name]["gb_per_second"] / base, 3)
    result["memory_bytes"] = {
        num_rows: producer.store(outputs.new(), moments_given=False, num_rows=num_rows)
        for num_rows in (shape.num_rows // 4, shape.num_rows)
    }
    return result


def cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    fields = dict(
        [part.strip() for part in line.split(":", 1)]
        for line in (info.read_text().splitlines() if info.exists() else [])
        if ":" in line
    )
    flags = fields.get("flags", "").split()
    return {
        "model": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "flags": [unit for unit in ("avx2", "avx512f", "f16c", "sha_ni") if unit in flags],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to write; a temporary directory if absent")
    parser.add_argument("--rounds", type=int, default=7, help="the first is discarded")
    parser.add_argument("--ballast", type=parse_bytes, default=parse_bytes("17GB"))
    parser.add_argument("--d-model", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--rows", type=int, default=Shape.num_rows, help="rows of each layer")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        if options.ballast:
            fill_page_cache(Path(temporary) / "ballast", options.ballast)
        for d_model in options.d_model:
            parent = Path(temporary) / str(d_model)
            parent.mkdir()
            results.append(measure(Shape(d_model, options.rows), parent, options.rounds))
            print(json.dumps(results[-1], indent=2), flush=True)
            shutil.rmtree(parent)
    summary = {
        "benchmark": "writer",
        "ratio": min(result["moments_given"]["ratio"] for result in results),
        "wanted": 0.6,
        "shapes": results,
        "rounds": options.rounds - 1,
        "numpy": np.__version__,
        "cpu": cpu(),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
