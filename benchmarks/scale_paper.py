"""The tables of docs/how-large.md: what large harvests weigh and take, from the store's own layout.

Bytes, shards and objects are what `mlsae harvest` would plan. Hours are the largest of three
bounds, times the overhead of the harvest over its bound: forward passes at 2 floating-point
operations a parameter and token on a share of an H200's peak, bytes to the disk at a share of its
rate, and bytes through the hash.

    python -m benchmarks.scale_paper
"""

from dataclasses import dataclass

from benchmarks.markdown import table
from mlsae.base.units import format_bytes, format_count
from mlsae.store.format.encoding import check_encoding, parts_of
from mlsae.store.format.layout import array_bytes, plan_layout
from mlsae.store.write.writer import MOST_WRITER_THREADS

H200_PEAK = 989e12
"""Dense bfloat16 FLOP/s, NVIDIA's data sheet."""
FORWARD_SHARE = 0.4
"""Share of that peak that a plain forward pass of transformers is taken to reach."""
WRITER_SHARE = 0.6
"""Share of the disk's own rate that the writer is held to; see docs/evidence/benchmarks.md."""
HASH_RATE = MOST_WRITER_THREADS * 1.1e9
"""Bytes a second that one process with cores enough hashes (SHA-256) and writes. A thread reached
1.1 GB/s on an Intel Xeon and 2.1 GB/s on an AMD EPYC."""
OVERHEAD = 1.1
"""Multiple of the larger bound that the harvest is held to."""
DISKS = {"shared file system, 2 GB/s": 2e9, "NVMe array, 10 GB/s": 10e9}
CONTEXT = 1024


@dataclass(frozen=True)
class Case:
    """A harvest on paper."""

    name: str
    parameters: float
    """Parameters of the backbone without embeddings, which cost no products."""
    num_layers: int
    d_model: int
    num_tokens: int


CASES = (
    Case("Llama-3-8B, 100 M tokens", 7.0e9, 32, 4096, 100_000_000),
    Case("Pythia-410m, 1 B tokens", 302e6, 24, 1024, 1_000_000_000),
)
KEPT = (None, 128)


def size_rows(case: Case) -> list[list[str]]:
    """By encoding and by kept positions: bytes, shards of a layer, largest object, objects."""
    rows = []
    for keep in KEPT:
        for encoding in map(check_encoding, ("bfloat16", "int8", "float32")):
            row_bytes = [part.row_bytes for part in parts_of(encoding, case.d_model)]
            layout = plan_layout(
                num_tokens=case.num_tokens // CONTEXT * CONTEXT,
                context_length=CONTEXT,
                layers=range(case.num_layers),
                sites=("resid_post",),
                d_model=case.d_model,
                encoding=encoding,
                batch_sequences=16,
                keep_positions=keep,
            )
            shards = layout.num_shards * case.num_layers
            largest = array_bytes(
                layout.num_rows, max(row_bytes), layout.chunk_rows, layout.shard_rows
            )
            rows.append(
                [
                    "all" if keep is None else str(keep),
                    "float16, bfloat16" if encoding == "bfloat16" else encoding,
                    format_bytes(layout.total_bytes),
                    format_count(layout.num_shards),
                    format_bytes(largest / layout.num_shards),
                    format_count(shards * len(row_bytes)),
                ]
            )
    return rows


def hours(case: Case, keep: int | None, disk: float, num_gpus: int) -> tuple[float, str]:
    """Hours in 16 bits, and which bound holds."""
    share = 1.0 if keep is None else keep / CONTEXT
    num_bytes = 2 * case.num_tokens * share * case.num_layers * case.d_model
    forward = 2 * case.parameters * case.num_tokens / (H200_PEAK * FORWARD_SHARE * num_gpus)
    to_disk = num_bytes / (disk * WRITER_SHARE)
    hashing = num_bytes / (HASH_RATE * num_gpus)
    bounds = {"forward": forward, "disk": to_disk, "hash": hashing}
    bound = max(bounds, key=lambda name: bounds[name])
    return OVERHEAD * bounds[bound] / 3600, bound


def time_rows(case: Case) -> list[list[str]]:
    """By disk, kept positions and GPUs."""
    rows = []
    for name, disk in DISKS.items():
        for keep in KEPT:
            cells = []
            for num_gpus in (1, 8):
                time, bound = hours(case, keep, disk, num_gpus)
                cells.append(f"{time:.2g} h ({bound})")
            rows.append([name, "all" if keep is None else str(keep), *cells])
    return rows


def tables() -> str:
    """Markdown of all of them."""
    parts = []
    for case in CASES:
        sizes = table(
            ["positions kept", "encoding", "store", "shards", "object", "objects"], size_rows(case)
        )
        times = table(["disk", "positions kept", "1 H200", "8 H200"], time_rows(case))
        parts.append(f"### {case.name}\n\n{sizes}\n\n{times}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(tables())
