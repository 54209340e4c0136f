"""The table `events` at size: events a second, bytes an event, memory, and one latent's bytes.

A store of random rows in float16, and a TopK SAE with random weights whose encoder bias makes some
latents far more frequent than others. `mlsae events` runs as a process of its own, watched
from here ten times a second: its anonymous and shared memory. At 25M events there is one whole part
a layer; below, parts are smaller. Then, each in a process of its own, every event is read and the
events of two latents, the median one by frequency and the most frequent; what was read is what the
system counted (`rchar` of /proc/self/io), from opening the directory on. The rows of a latent that
are read are checked against those that the full scan saw.

    python benchmarks/events.py [--events 10M,25M,100M] [--work DIR]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlsae.base.units import format_bytes, format_count, parse_count
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.store import create, open_store

D_MODEL, NUM_LAYERS, CONTEXT, K, NUM_LATENTS = 128, 6, 256, 32, 16_384
BATCH_SEQUENCES = 64
FULL = """
import json, sys
import numpy as np
from mlsae.analyze import load_events
def read(): return int(open("/proc/self/io").readline().split()[1])
before = read()
found = load_events(sys.argv[1])
counts = np.zeros(int(sys.argv[2]), dtype=np.int64)
rows = np.zeros(int(sys.argv[2]), dtype=np.int64)
for batch in found.events.to_batches():
    latent = batch["latent"].to_numpy()
    counts += np.bincount(latent, minlength=len(counts))
    np.add.at(rows, latent, batch["row"].to_numpy())
num_bytes = read() - before
order = np.argsort(counts, kind="stable")
chosen = {"median": int(order[len(order) // 2]), "most frequent": int(order[-1])}
print(json.dumps({"bytes": num_bytes, "num_events": int(counts.sum()), "latents": {
    name: {"latent": n, "num_events": int(counts[n]), "sum_of_rows": int(rows[n])}
    for name, n in chosen.items()}}))
"""
ONE = """
import json, sys, time
import pyarrow.compute as pc
from mlsae.analyze import latent_events, load_events
def read(): return int(open("/proc/self/io").readline().split()[1])
before, began = read(), time.perf_counter()
events = latent_events(load_events(sys.argv[1]), int(sys.argv[2]))
seconds, num_bytes = time.perf_counter() - began, read() - before
print(json.dumps({"bytes": num_bytes, "num_events": len(events), "seconds": seconds,
                  "sum_of_rows": pc.sum(events["row"]).as_py()}))
"""


def make_store(path: Path, num_events: int) -> None:
    """Write a store of as many tokens as have about `num_events` active latents over all layers."""
    num_sequences = -(-num_events // (NUM_LAYERS * K * (CONTEXT - 1)))
    num_sequences += -num_sequences % BATCH_SEQUENCES
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50_000, num_sequences * CONTEXT)
    with create(
        path,
        tokens=tokens,
        context_length=CONTEXT,
        layers=range(NUM_LAYERS),
        d_model=D_MODEL,
        batch_sequences=BATCH_SEQUENCES,
    ) as writer:
        shape = (BATCH_SEQUENCES * CONTEXT, D_MODEL)
        while writer.pending():
            writer.append(
                {
                    ("resid_post", layer): rng.standard_normal(shape, dtype=np.float32)
                    for layer in range(NUM_LAYERS)
                }
            )


def make_sae(path: Path, cache: Path) -> None:
    """Random weights; a bias of a standard normal latent's size spreads the frequencies."""
    store = open_store(cache)
    generator = torch.Generator().manual_seed(0)
    sae = SAE(
        SAEConfig(d_in=D_MODEL, num_latents=NUM_LATENTS, architecture=TopK(K), encoder_bias=True),
        generator,
    )
    assert sae.b_enc is not None
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_dec)
        sae.b_enc.normal_(0, 0.5, generator=generator)
    record = {
        "store_id": store.store_id,
        "model_fingerprint": None,
        "site": "resid_post",
        "layers": list(store.layers),
        "skip_positions": 1,
        "validation": {"fraction": 0.0, "seed": 0, "tokens_sha256": store.plan.tokens_sha256},
    }
    sae.save(path, record)


def memory_of(pid: int) -> int | None:
    """RssAnon + RssShmem in bytes; None once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return 1024 * (int(sizes["RssAnon"]) + int(sizes["RssShmem"])) if sizes else None


def write_events(work: Path) -> dict[str, Any]:
    """Run the command and watch it."""
    command = [sys.executable, "-m", "mlsae", "events", "--rows", "all", "--device", "cpu"]
    command += ["--cache", str(work / "acts"), "--sae", str(work / "sae")]
    began, seen = time.perf_counter(), []
    with subprocess.Popen([*command, "--out", str(work / "events")]) as process:
        while process.poll() is None:
            if (now := memory_of(process.pid)) is not None:
                seen.append(now)
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"mlsae events failed with {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_bytes": max(seen),
        "median_memory_bytes": int(statistics.median(seen)),
    }


def ask(script: str, *arguments: object) -> dict[str, Any]:
    """Output of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return dict(json.loads(done.stdout))


def measure(num_events: int, parent: Path) -> dict[str, Any]:
    """One size."""
    work = Path(tempfile.mkdtemp(dir=parent))
    try:
        make_store(work / "acts", num_events)
        make_sae(work / "sae", work / "acts")
        found = write_events(work)
        full = ask(FULL, work / "events", NUM_LATENTS)
        queries = {}
        for name, seen in full["latents"].items():
            one = ask(ONE, work / "events", seen["latent"])
            for key in ("num_events", "sum_of_rows"):
                assert one[key] == seen[key], (name, key, one, seen)
            queries[name] = {
                "latent": seen["latent"],
                "num_events": one["num_events"],
                "bytes": one["bytes"],
                "seconds": round(one["seconds"], 3),
                "of_full_scan": round(one["bytes"] / full["bytes"], 5),
            }
        data = sum(file.stat().st_size for file in (work / "events").rglob("*.parquet"))
        return {
            "num_events": full["num_events"],
            **found,
            "events_per_second": round(full["num_events"] / found["seconds"]),
            "num_files": sum(1 for _ in (work / "events").rglob("*.parquet")),
            "bytes_per_event": round(data / full["num_events"], 3),
            "full_scan_bytes": full["bytes"],
            "one_latent": queries,
        }
    finally:
        shutil.rmtree(work)


def main() -> None:
    """Print a line a size, and last one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--events", default="10M,25M,100M")
    parser.add_argument("--work", type=Path, default=Path.cwd())
    arguments = parser.parse_args()
    results = []
    for size in arguments.events.split(","):
        result = measure(parse_count(size), arguments.work)
        results.append(result)
        shares = ", ".join(
            f"{name} latent {of['of_full_scan']:.2%} of a full scan's bytes"
            for name, of in result["one_latent"].items()
        )
        print(
            f"{format_count(result['num_events'])} events: "
            f"{format_count(result['events_per_second'])} events/s, "
            f"{result['bytes_per_event']} bytes an event, memory at most "
            f"{format_bytes(result['peak_memory_bytes'])}; {shares}; "
            f"load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    print(
        json.dumps(
            {
                "benchmark": "events",
                "shape": {
                    "d_model": D_MODEL,
                    "num_layers": NUM_LAYERS,
                    "k": K,
                    "num_latents": NUM_LATENTS,
                },
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "capability": torch.backends.cpu.get_cpu_capability(),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
