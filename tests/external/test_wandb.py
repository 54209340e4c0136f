"""Weights & Biases itself, offline: it has every line of the log."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlsae.demo import model_path, text_path
from mlsae.train.running.tracking import scalars

pytestmark = [pytest.mark.external, pytest.mark.timeout(900)]


def test_every_line_of_the_log_is_in_the_offline_run(
    libraries: Callable[[str], Path], tmp_path: Path
) -> None:
    """As a user has it: beside the package, without the network; two SAEs, two runs."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    environment |= {"PYTHONPATH": str(libraries("wandb")), "WANDB_MODE": "offline"}

    def python(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    acts, out = tmp_path / "acts", tmp_path / "run"
    command = ["-m", "mlsae", "harvest", "--model", model_path(), "--dataset"]
    command += [text_path("held_out"), "--max-tokens", "4k", "--context-length", "64"]
    python(*command, "--layers", "0,1", "--out", acts, "--device", "cpu")
    command = ["-m", "mlsae", "train", "--cache", acts, "--out", out, "--num-latents", "64,128"]
    python(*command, "-k", "4", "--batch-size", "512", "--track", "wandb", "--device", "cpu")
    for name in ("N64", "N128"):
        (run,) = (out / name / "wandb").glob("offline-run-*/run-*.wandb")
        assert (out / name / "wandb-id").read_text() in run.name
        found = json.loads(python(Path(__file__).with_name("in_wandb.py"), run))
        lines = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
        assert len(found) == len(lines) > 5
        for sent, line in zip(found, lines, strict=True):
            assert sent["_step"] == line["step"]
            assert scalars(line).items() <= sent.items()
