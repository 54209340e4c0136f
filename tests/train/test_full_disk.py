"""A disk that fills under a checkpoint: one line, and the one before it stays."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import torch
from mlsae.base.errors import ResourceError
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.train.running.checkpoint import Checkpoints
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.objective import Objective
from mlsae.train.step.optimizer import Optimizer

class Trainer:
    # What a checkpoint holds of one, without a step taken.
    def __init__(self):
        config = SAEConfig(d_in=16, num_latents=512, architecture=TopK(4))
        self.sae = SAE(config, torch.Generator().manual_seed(0))
        self.dead = DeadLatents(512, 1000, torch.device("cpu"))
        self.step_number = 0
        self.optimizer = Optimizer(self.sae)
        self.objective = Objective(self.sae, np.ones(1), "raw")

trainer, checkpoints = Trainer(), Checkpoints(Path(sys.argv[1]) / "checkpoints")
for number in range(1, 9):
    trainer.step_number = number
    try:
        checkpoints.save(trainer)
    except ResourceError as error:
        print(error)
        break
print(sorted(path.name for path in checkpoints.directory.iterdir()))
print(checkpoints.restore(trainer, 2), trainer.step_number)
"""


def test_the_checkpoint_before_stays(tmp_path: Path):
    """On a real file system with room for two checkpoints and a half."""
    if shutil.which("unshare") is None:
        pytest.skip("needs the unshare command to mount a small file system")
    mount = f"mount -t tmpfs -o size=560k tmpfs '{tmp_path}' && exec \"$@\""
    command = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    done = subprocess.run(
        [*command, sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"the disk is full: {tmp_path}/checkpoints/step-0000000003.safetensors could not be "
        "written; what was finished before is safe, free some space and run the same command again",
        "['step-0000000001.json', 'step-0000000001.safetensors', 'step-0000000002.json', "
        "'step-0000000002.safetensors']",
        "{} 2",
    ]
