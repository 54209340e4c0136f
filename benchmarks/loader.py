"""Batches from a store against a gather of the same bytes from memory, in rows a second.

The peer is `numpy.take(rows, index, axis=0, out=batch, mode="clip")` on one thread: as many random
rows of an array in memory that holds all layers as they are stored. Ours are whole epochs of the
loader that training uses, page cache warm. *Later*: after every chunk has been checked once.
*First*: the first epoch of a process, which checks, from opening the loader on. Beside them
SAELens's reader, made again in `loader_peer.py`.

Rounds of all alternate; a ratio is of medians over rounds, the first of which is discarded. Memory
is taken once and used again, loaders stay open and wait while others run, and the page cache is
filled before (--ballast): on a virtual machine that hands freed memory back to its host, fresh
pages cost more than the copies that are measured. Printed beside each speed: CPU time for a million
rows, its system share, and the cores that other programs kept busy meanwhile: where that is not
near 0, the speed is theirs as well as ours.

    python -m benchmarks.loader --dir DISK [--rounds 7] [--ballast 8GB] [--memory]
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import loader_peer
from benchmarks.loader_stores import SITE, make_store
from benchmarks.made import machine
from benchmarks.page_cache import fill_page_cache
from benchmarks.rounds import Contender, alternate, anonymous_memory
from mlsae.base.units import parse_bytes
from mlsae.store import Store, open_store
from mlsae.store.read.split import validation_of
from mlsae.train.data.loader import Loader
from mlsae.train.data.mixture import Mixture

NUM_LAYERS, D_MODEL, NUM_ROWS = 6, 512, 262_144
BATCHES = (4096, 16384)
WINDOWS = {"64 MiB": 2**26, "1 GiB": 2**30}
ZSTD_STEPS, PEER_BATCHES = 40, 24
COLD_STEPS, COLD_THREADS, COLD_ROUNDS = 100, (1, 2, 4, 8), 4
ENDLESS = 10**9

MEMORY_ROWS = (2**20, 2**24)
MEMORY_SHAPE: dict[str, Any] = {"num_layers": 2, "d_model": 128}
MEMORY_BATCH, MEMORY_STEPS = 1024, 300


def mixture_of(store: Store, batch_rows: int, window: int | None = None) -> Mixture:
    return Mixture.plan(
        store,
        SITE,
        store.layers,
        batch_rows=batch_rows,
        seed=0,
        skip_positions=1,
        validation=validation_of(store, 0.01, 0),
        window=window,
    )


def take(store: Store, batch_rows: int, name: str) -> Contender:
    """The measure: random rows of all layers, which it holds in memory."""
    layers = [store.reader(SITE, layer).read() for layer in store.layers]
    stored = [np.concatenate(parts) for parts in zip(*layers, strict=True)]
    shape = NUM_LAYERS * NUM_ROWS // batch_rows, batch_rows
    index = np.random.default_rng(0).integers(0, len(stored[0]), shape)
    out = [np.zeros((batch_rows, part.shape[1]), part.dtype) for part in stored]

    def work() -> int:
        for rows in index:
            for part, batch in zip(stored, out, strict=True):
                np.take(part, rows, axis=0, out=batch, mode="clip")
        return index.size

    return Contender(name, work)


class Epochs:
    """A loader in the midst of a long run; a round is as many steps as an epoch has, or fewer."""

    def __init__(self, mixture: Mixture, steps: int | None, **options: Any) -> None:
        self.loader = Loader(mixture, start=mixture.epoch_steps, stop=ENDLESS, **options)
        self._ready = mixture.num_batches
        self._steps = steps or mixture.epoch_steps

    def skip_ready(self) -> None:
        """Batches that were made while others ran are not counted."""
        for _ in range(self._ready):
            next(self.loader)

    def run(self) -> int:
        """A round; returns rows."""
        return sum(next(self.loader).num_rows for _ in range(self._steps))


def first_epoch(path: Path) -> int:
    """A fresh process's: nothing has been checked."""
    mixture = mixture_of(open_store(path), BATCHES[0])
    with Loader(mixture, start=0, stop=mixture.epoch_steps) as loader:
        return sum(batch.num_rows for batch in loader)


def peer_batches(batches: Iterator[torch.Tensor]) -> int:
    return sum(len(next(batches)) for _ in range(PEER_BATCHES))


def speeds(paths: dict[str, Path], peers: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Everything with a warm page cache."""
    with contextlib.ExitStack() as stack:
        contenders: list[Contender] = []

        def epochs(name: str, form: str, batch_rows: int, **options: Any) -> None:
            mixture = mixture_of(stores[form], batch_rows, options.pop("window", None))
            steps = ZSTD_STEPS if "zstd" in form else None
            made = Epochs(mixture, steps, **options)
            stack.enter_context(made.loader)
            contenders.append(Contender(name, made.run, made.skip_ready))

        stores = {form: open_store(path) for form, path in paths.items()}
        for form in ("float16", "int8"):
            for batch_rows in BATCHES:
                contenders.append(take(stores[form], batch_rows, f"take {form} {batch_rows}"))
                epochs(f"later {form} {batch_rows}", form, batch_rows)
            for threads in (1, 2):
                name = f"later {form} {BATCHES[0]}, {threads} threads"
                epochs(name, form, BATCHES[0], threads=threads)
            first = functools.partial(first_epoch, paths[form])
            contenders.append(Contender(f"first {form} {BATCHES[0]}", first))
        for form in ("float16-zstd", "int8-zstd"):
            epochs(f"later {form} {BATCHES[0]}", form, BATCHES[0])
        for name, window in WINDOWS.items():
            epochs(
                f"later float16 {BATCHES[0]}, window {name}", "float16", BATCHES[0], window=window
            )
        for dtype, path in peers.items():
            batches = loader_peer.batches(path, getattr(torch, dtype), BATCHES[0])
            some = functools.partial(peer_batches, batches)
            contenders.append(Contender(f"SAELens {dtype} {BATCHES[0]}", some))
        alternate(contenders, rounds)
    speed = {contender.name: contender.speed for contender in contenders}
    results = {contender.name: contender.result() for contender in contenders}
    for name, result in results.items():
        kind, form, rows, *_ = name.replace(",", "").split()
        if kind in ("later", "first"):
            measure = f"take {form.removesuffix('-zstd')} {rows}"
            result["ratio_to_take"] = round(speed[name] / speed[measure], 3)
        print(json.dumps({name: result}), flush=True)
    return results


def evict(path: Path) -> None:
    """Ask for a store's files to leave the page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def sequential(path: Path) -> int:
    """Rows of a layer, MiB after MiB."""
    buffer, size = np.zeros(2**20, np.uint8), 0
    for file in sorted((path / "activations" / SITE / "0").glob("c.*")):
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer.data):
                size += count
    return size // (2 * D_MODEL)


def cold(path: Path) -> dict[str, Any]:
    """After every chunk was checked once, but with the store's files out of the page cache."""
    store = open_store(path)
    mixture = mixture_of(store, BATCHES[0])
    for layer in store.layers:
        store.reader(SITE, layer).read()

    def epoch(threads: int) -> int:
        start = mixture.epoch_steps
        with Loader(mixture, start=start, stop=start + COLD_STEPS, threads=threads) as loader:
            return sum(batch.num_rows for batch in loader)

    def contender(name: str, work: Callable[[], int]) -> Contender:
        return Contender(f"cold, {name}", work, lambda: evict(path))

    contenders = [contender("one file after another", lambda: sequential(path))]
    for threads in COLD_THREADS:
        ours = functools.partial(epoch, threads)
        contenders.append(contender(f"{threads} threads", ours))
    alternate(contenders, COLD_ROUNDS)
    results = {contender.name: contender.result() for contender in contenders}
    for name, result in results.items():
        print(json.dumps({name: result}), flush=True)
    return results


def most_memory(path: Path) -> int:
    """The most anonymous and shared memory while batches come from the midst of an epoch."""
    mixture = mixture_of(open_store(path), MEMORY_BATCH)
    start, most = mixture.epoch_steps // 2, 0
    with Loader(mixture, start=start, stop=start + MEMORY_STEPS) as loader:
        for _ in loader:
            most = max(most, anonymous_memory())
    return most


def memory(parent: Path) -> dict[str, Any]:
    """Stores of 1 M and 16 M rows a layer, each read by a process of its own."""
    most = {}
    for num_rows in MEMORY_ROWS:
        path = make_store(parent / str(num_rows), num_rows=num_rows, **MEMORY_SHAPE)
        command = [sys.executable, "-m", "benchmarks.loader", "--most-memory", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        most[num_rows] = int(done.stdout)
        shutil.rmtree(path)
    small, large = (most[num_rows] for num_rows in MEMORY_ROWS)
    result = {
        **MEMORY_SHAPE,
        "batch_rows": MEMORY_BATCH,
        "bytes": most,
        "ratio": round(large / small, 3),
        "wanted": 1.1,
    }
    print(json.dumps({"memory": result}), flush=True)
    return result


def peer_data(parent: Path, store: Store) -> dict[str, Path]:
    """One layer of a store as SAELens caches it: in its default type, and in ours."""
    rows = store.read(SITE, 0).reshape(-1, store.context_length, D_MODEL)
    made = {}
    for dtype in ("float32", "float16"):
        made[dtype] = parent / f"saelens-{dtype}"
        loader_peer.write(made[dtype], rows, dtype)
    return made


def measure(parent: Path, options: argparse.Namespace) -> dict[str, Any]:
    if options.ballast:
        fill_page_cache(parent / "ballast", options.ballast)
    paths = {}
    for encoding in ("float16", "int8"):
        for compression in ("none", "zstd"):
            form = encoding if compression == "none" else f"{encoding}-zstd"
            paths[form] = make_store(
                parent / form,
                num_layers=NUM_LAYERS,
                num_rows=NUM_ROWS,
                d_model=D_MODEL,
                encoding=encoding,
                compression=compression,
            )
    peers = peer_data(parent, open_store(paths["float16"]))
    warm = speeds(paths, peers, options.rounds)
    ours = warm[f"later float16 {BATCHES[0]}"]["rows_per_second"]
    summary: dict[str, Any] = {
        "benchmark": "loader",
        "ratio_float16": warm[f"later float16 {BATCHES[0]}"]["ratio_to_take"],
        "wanted_float16": 0.75,
        "ratio_int8": warm[f"later int8 {BATCHES[0]}"]["ratio_to_take"],
        "wanted_int8": 0.45,
        "ratio_to_saelens": {
            dtype: round(ours / warm[f"SAELens {dtype} {BATCHES[0]}"]["rows_per_second"], 1)
            for dtype in peers
        },
        "wanted_to_saelens": 10,
        "warm": warm,
        "cold": cold(paths["float16"]),
    }
    for path in (*paths.values(), *peers.values()):
        shutil.rmtree(path)
    if options.memory:
        summary["memory"] = memory(parent)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to write; a temporary directory if absent")
    parser.add_argument("--rounds", type=int, default=7, help="the first is discarded")
    parser.add_argument("--ballast", type=parse_bytes, default=parse_bytes("8GB"))
    parser.add_argument("--memory", action="store_true", help="10 GB of disk and some minutes more")
    parser.add_argument("--most-memory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.most_memory:
        print(most_memory(options.most_memory))
        return
    torch.set_num_threads(1)
    began = time.time()
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        summary = measure(Path(temporary), options)
    summary |= {"rounds": options.rounds - 1, "seconds": round(time.time() - began)}
    print(json.dumps({**summary, "machine": machine(), "cpu_flags": cpu_flags()}))


def cpu_flags() -> list[str]:
    """Those that matter here."""
    info = Path("/proc/cpuinfo").read_text()
    flags = info.partition("flags")[2].partition("\n")[0].split()
    return [flag for flag in ("avx2", "avx512f", "erms", "fsrm") if flag in flags]


if __name__ == "__main__":
    main()
