"""A real harvest larger than memory: bytes a second, memory and stalls, at two sizes.

A GPT-NeoX of Pythia-70m's shape with random weights in bfloat16 reads random tokens; all six layers
go to the disk. The harvest is a process of its own, watched from here ten times a second: its
anonymous and shared memory (file pages are the system's cache, not its own), and how far its shards
have grown. A stall is a stretch of over five seconds in which the store did not grow. Two sizes are
run, so that memory can be seen not to depend on the number of tokens: its median while shards grow,
because the peak of many looks is higher than that of few.

    python benchmarks/scale.py [--sizes 2GB,31GB] [--work DIR]
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from tokenizers import Tokenizer, models

from mlsae.base.units import format_bytes, parse_bytes

D_MODEL, NUM_LAYERS, CONTEXT, BATCH = 512, 6, 512, 16
VOCABULARY = 50_304
TOKEN_BYTES = D_MODEL * NUM_LAYERS * 2
STALL_SECONDS = 5.0


def make_model(path: Path) -> None:
    """Weights and a tokenizer that only has to exist."""
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        intermediate_size=4 * D_MODEL,
        max_position_embeddings=2048,
    )
    auto_class: Any = transformers.AutoModelForCausalLM
    model = auto_class.from_config(config)
    model.to(torch.bfloat16).save_pretrained(path)
    words = {f"t{i}": i for i in range(VOCABULARY - 1)} | {"<eos>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer_class: Any = transformers.PreTrainedTokenizerFast
    tokenizer_class(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)


def make_text(path: Path, num_tokens: int) -> None:
    """Documents of 2,000 random token ids."""
    generator = np.random.default_rng(0)
    schema = pa.schema({"tokens": pa.list_(pa.int32())})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_tokens + 2000, 2_000_000):
            size = min(2_000_000, num_tokens + 2000 - start) // 2000 * 2000
            ids = pa.array(generator.integers(0, VOCABULARY - 1, size, dtype=np.int32))
            offsets = pa.array(np.arange(0, size + 1, 2000, dtype=np.int32))
            writer.write_table(
                pa.Table.from_arrays([pa.ListArray.from_arrays(offsets, ids)], schema=schema)
            )


def own_memory(pid: int) -> int:
    """Bytes of anonymous and shared memory of a process; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(n) for n in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status))


def stored_bytes(out: Path) -> int:
    """Bytes of activation shards, finished or not."""
    total = 0
    for file in out.glob("activations/*/*/c.*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def harvest(size: int, model: Path, work: Path) -> dict[str, Any]:
    """One harvest of about `size` bytes, watched."""
    num_tokens = size // TOKEN_BYTES // CONTEXT * CONTEXT
    make_text(work / "tokens.parquet", num_tokens)
    out = work / "acts"
    command = [
        sys.executable, "-m", "mlsae", "harvest", "--model", str(model),
        "--dataset", str(work / "tokens.parquet"), "--tokens-column", "tokens", "--out", str(out),
        "--max-tokens", str(num_tokens), "--context-length", str(CONTEXT),
        "--batch-size", str(BATCH), "--device", "cpu",
    ]  # fmt: skip
    stalled, memory = 0.0, []
    began = first = time.monotonic()
    last_growth, grown = began, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            time.sleep(0.1)
            now, size_now = time.monotonic(), stored_bytes(out)
            if grown:
                memory.append(own_memory(process.pid))
            if size_now > grown:
                if grown == 0:
                    first = now
                elif now - last_growth > STALL_SECONDS:
                    stalled += now - last_growth
                last_growth, grown = now, size_now
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the harvest failed with {process.returncode}")
    seconds = last_growth - first
    system = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "tokens": num_tokens,
        "bytes": grown,
        "seconds": round(seconds, 1),
        "seconds_in_all": round(time.monotonic() - began, 1),
        "gigabytes_per_second": round(grown / seconds / 1e9, 4),
        "tokens_per_second": round(num_tokens / seconds),
        "anonymous_and_shared_median": int(statistics.median(memory)),
        "anonymous_and_shared_peak": max(memory),
        "stalled_seconds": round(stalled, 1),
        "user_cpu_seconds": round(system.ru_utime, 1),
        "system_cpu_seconds": round(system.ru_stime, 1),
        "last_line": said.strip().splitlines()[-1],
    }
    shutil.rmtree(out)
    return result


def main() -> None:
    """Print a line a size, and last one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="2GB,31GB")
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="a folder on a large disk")
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        work = Path(directory)
        make_model(work / "model")
        for text in arguments.sizes.split(","):
            result = harvest(parse_bytes(text), work / "model", work)
            found.append(result)
            print(
                f"{format_bytes(result['bytes'])} in {result['seconds']} s: "
                f"{result['gigabytes_per_second']} GB/s, {result['tokens_per_second']:,} tokens/s; "
                f"anonymous and shared memory {format_bytes(result['anonymous_and_shared_median'])}"
                f" (peak {format_bytes(result['anonymous_and_shared_peak'])}); stalls of over "
                f"{STALL_SECONDS:.0f} s: {result['stalled_seconds']} s in all",
                flush=True,
            )
    memory = [result["anonymous_and_shared_median"] for result in found]
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(
        json.dumps(
            {
                "benchmark": "scale",
                "physical_memory": physical,
                "memory_ratio": round(memory[-1] / memory[0], 3),
                "results": found,
            }
        )
    )


if __name__ == "__main__":
    main()
