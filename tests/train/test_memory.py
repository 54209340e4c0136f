"""Memory of a step: measured in processes of their own, against the estimate."""

import subprocess
import sys

import pytest

from mlsae.sae import SAEConfig, TopK
from mlsae.train.running.memory import step_memory

MEASURE = """
import sys
import numpy as np
import torch
from accelerate import Accelerator
from mlsae.base.machine.heap import keep_freed_memory
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.train.step.dead import DeadLatents
from mlsae.train.data.loader import Batch
from mlsae.train.step.objective import Objective
from mlsae.train.step.schedule import Schedule
from mlsae.train.step.trainer import Trainer

def run(rows, d_in, num_latents, k, micro_batch, mixed, dead_after):
    config = SAEConfig(d_in=d_in, num_latents=num_latents, architecture=TopK(k))
    sae = SAE(config, torch.Generator().manual_seed(0))
    objective = Objective(sae, np.ones(1), "standardized", mixed=mixed)
    dead = DeadLatents(num_latents, dead_after, torch.device("cpu"))
    trainer = Trainer(sae, objective, Schedule(1e-3, 9, 0, 0), dead, accelerator, micro_batch)
    batch = Batch(torch.randn(rows, d_in), torch.zeros(rows, dtype=torch.int64), rows)
    for _ in range(3):
        trainer.step(batch)

def peak():
    status = open("/proc/self/status").read().split("VmHWM:")[1]
    return 1024 * int(status.split()[0])

torch.set_num_threads(1)
keep_freed_memory()
accelerator = Accelerator(cpu=True)
run(64, 16, 64, 4, None, False, 1)
before = peak()
rows, d_in, num_latents, k, micro_batch, mixed, dead_after = map(int, sys.argv[1:])
run(rows, d_in, num_latents, k, micro_batch or None, bool(mixed), dead_after)
print(peak() - before)
"""
NEVER = 10**9


def grown(
    rows: int,
    sae: SAEConfig,
    *,
    micro_batch: int = 0,
    mixed: bool = False,
    dead_after: int = NEVER,
) -> int:
    """Bytes by which a process's largest resident size grows through three steps."""
    k = sae.architecture.most_active
    numbers = [rows, sae.d_in, sae.num_latents, k, micro_batch, int(mixed), dead_after]
    words = [sys.executable, "-c", MEASURE, *map(str, numbers)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
class TestPeak:
    def test_no_tensor_of_rows_times_latents_outlives_a_block(self) -> None:
        """4,096 × 65,536 pre-activations would be 1 GiB; a step takes less than a tenth of it."""
        assert grown(4096, SAEConfig(d_in=16, num_latents=65536, architecture=TopK(4))) < 2**30 / 10

    def test_micro_batches_bound_the_activations(self) -> None:
        """The batch itself is left, and the memory for the rows of one piece."""
        sae = SAEConfig(d_in=256, num_latents=1024, architecture=TopK(8))
        rows = 16384
        whole, pieces = grown(rows, sae), grown(rows, sae, micro_batch=512)
        batch = rows * 256 * 4
        assert whole - batch > 6 * batch
        assert pieces - batch < whole / 4

    @pytest.mark.parametrize(
        ("rows", "num_latents", "mixed", "dead_after"),
        [(8192, 2048, True, NEVER), (512, 16384, False, 1)],
        ids=["many rows", "dead latents"],
    )
    def test_the_estimate_is_no_less_than_the_peak(
        self, rows: int, num_latents: int, mixed: bool, dead_after: int
    ) -> None:
        """Nor more than twice it."""
        sae = SAEConfig(d_in=256, num_latents=num_latents, architecture=TopK(16))
        parts = step_memory(sae, rows, max(256, rows // 16), mixed=mixed)
        if dead_after == NEVER:
            del parts["AuxK"]
        batch = rows * sae.d_in * 4
        measured = grown(rows, sae, mixed=mixed, dead_after=dead_after) - batch
        assert 0.5 * sum(parts.values()) < measured <= sum(parts.values())
