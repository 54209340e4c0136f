"""Eight SAEs trained in one pass over a store, against eight runs of one SAE each.

Each run is a whole one, from opening the store to the SAE directory, in one process. Rounds
alternate, the first is discarded, and the ratio is of medians over the others. What is printed
besides: cores that other programs kept busy.

    python -m benchmarks.sweep --dir DISK [--rounds 5] [--threads 2]
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader_stores import make_store
from benchmarks.made import commit, machine
from benchmarks.rounds import busy_seconds
from mlsae.base.machine.heap import keep_freed_memory
from mlsae.train import Sweep, TrainConfig, run, run_sweep

NUM_LAYERS, D_MODEL, NUM_ROWS = 6, 512, 65_536
SAES, NUM_LATENTS, K, BATCH = 8, 1024, 32, 4096


def settings(store: Path, out: Path, **more: Any) -> TrainConfig:
    return TrainConfig(
        cache=store,
        out=out,
        num_latents=NUM_LATENTS,
        k=K,
        batch_size=BATCH,
        validation_fraction=0.01,
        data_seed=0,
        device="cpu",
        **more,
    )


def one_pass(store: Path, out: Path) -> None:
    run_sweep(Sweep(config=settings(store, out / "sweep"), axes={"seed": tuple(range(SAES))}))


def runs(store: Path, out: Path) -> None:
    for seed in range(SAES):
        run(settings(store, out / f"run{seed}", seed=seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="on the disk to read from")
    parser.add_argument("--rounds", type=int, default=5, help="one more is run and discarded")
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help="rows of the store, a layer")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    seconds: dict[str, list[float]] = {"one pass": [], "runs": []}
    others: dict[str, list[float]] = {"one pass": [], "runs": []}
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        place = Path(directory)
        store = make_store(
            place / "acts", num_layers=NUM_LAYERS, num_rows=options.rows, d_model=D_MODEL
        )
        contenders = {"one pass": one_pass, "runs": runs}
        for number in range(options.rounds + 1):
            for name in list(contenders)[:: -1 if number % 2 else 1]:
                out = place / "out"
                out.mkdir()
                began, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
                with contextlib.redirect_stdout(io.StringIO()):
                    contenders[name](store, out)
                seconds[name].append(time.perf_counter() - began)
                own = time.process_time() - own
                others[name].append((busy_seconds() - busy - own) / seconds[name][-1])
                shutil.rmtree(out)
                print(f"round {number}: {name} {seconds[name][-1]:.1f} s", flush=True)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    result = {
        "commit": commit(),
        "machine": machine(),
        "saes": SAES,
        "num_latents": NUM_LATENTS,
        "batch_rows": BATCH,
        "seconds": {name: [round(t, 2) for t in times[1:]] for name, times in seconds.items()},
        "cores_busy_with_others": {
            name: round(statistics.median(cores[1:]), 2) for name, cores in others.items()
        },
        "ratio": round(medians["one pass"] / medians["runs"], 3),
        "wanted": 0.85,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
