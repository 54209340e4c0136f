"""Ctrl-C and SIGTERM in real processes: a checkpoint first, then one line how to go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mlsae.base.interruption import InterruptedWorkError
from mlsae.cli import main
from mlsae.train import TrainConfig, pipeline, run
from mlsae.train.running import loop as passing
from mlsae.train.step.trainer import Trainer

FLAGS = "--num-latents 64 -k 4 --batch-size 60 --lr 3e-3 --validation-fraction 0.1 --device cpu"
LINE = re.compile(r"^stopped after step (\d+) of (\d+): add --resume to the same command to go on$")


def command(sample: Any, out: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "mlsae", "train", "--cache", str(sample.path), *FLAGS.split()]
    return [*words, "--out", str(out), *more]


def stopped(words: list[str], log: Path, number: signal.Signals) -> tuple[int, int]:
    """Send a signal once the log has lines; the step it stopped after, and the exit status."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 3):
            # The processor is the other's.
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    lines = [line for line in re.split("[\r\n]+", errors) if line.strip()]
    assert "Traceback" not in errors, errors
    found = LINE.match(lines[-1])
    assert found, errors
    return int(found[1]), process.returncode


def assert_equal(a: Path, b: Path) -> None:
    """Weights bit for bit, and the log but for its times."""
    ours, theirs = (load_file(directory / "sae.safetensors") for directory in (a, b))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    logs = [
        [{**json.loads(line), "rows_per_second": 0} for line in path.read_text().splitlines()]
        for path in (a / "log.jsonl", b / "log.jsonl")
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("number", "more"),
    [
        (signal.SIGINT, []),
        pytest.param(signal.SIGTERM, ["-k", "3"], marks=pytest.mark.slow),
    ],
    ids=["Ctrl-C", "SIGTERM of a sweep"],
)
def test_a_signal_checkpoints_first_and_the_run_goes_on_exactly(
    number: signal.Signals, more: list[str], sample: Any, tmp_path: Path
) -> None:
    """At whatever step it was."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    epochs = ["--epochs", "10"]
    first = "k4" if more else ""
    words = command(sample, out, *epochs, *more)
    step, status = stopped(words, out / first / "log.jsonl", number)
    assert status == 128 + number
    assert [path.stem for path in (out / first / "checkpoints").glob("*.json")] == [
        f"step-{step:010d}"
    ]
    for words in (
        command(sample, out, *epochs, *more, "--resume"),
        command(sample, whole, *epochs, *more),
    ):
        done = CliRunner().invoke(main, words[words.index("train") :])
        assert done.exit_code == 0, done.output
    for name in ("k4", "k3") if more else ("",):
        assert_equal(out / name, whole / name)


class StopError(Exception):
    """Ends a run in the middle."""


@pytest.mark.parametrize("step", [8, 10, 31])
def test_a_checkpoint_between_two_lines_of_the_log_keeps_their_means(
    step: int, sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of a resumed run is over all its steps, those before the checkpoint too."""
    monkeypatch.setattr(passing, "LINES", 4)
    config = TrainConfig(
        cache=sample.path,
        out=tmp_path / "out",
        num_latents=40,
        k=3,
        batch_size=60,
        checkpoint_seconds=0,
        validation_fraction=0.1,
        device="cpu",
    )
    original = Trainer.step

    def failing(self: Trainer, batch: Any) -> Any:
        if self.step_number == step:
            raise StopError
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        with pytest.raises(StopError):
            run(config)
    run(replace(config, resume=True))
    whole = run(replace(config, out=tmp_path / "whole")).directory
    assert_equal(config.out, whole)
    assert len((whole / "log.jsonl").read_text().splitlines()) in (4, 5)


def test_a_signal_while_saes_are_evaluated_keeps_their_last_step(
    sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is taken again."""
    config = TrainConfig(
        cache=sample.path,
        out=tmp_path / "out",
        num_latents=40,
        k=3,
        batch_size=60,
        validation_fraction=0.1,
        device="cpu",
    )

    def interrupted(*_arguments: Any, **_options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "evaluate", interrupted)
        with pytest.raises(
            InterruptedWorkError, match=r"^stopped: add --resume to the same"
        ) as stop:
            run(config)
    assert stop.value.exit_status == 143
    monkeypatch.setattr(Trainer, "step", None)
    run(replace(config, resume=True))
    monkeypatch.undo()
    assert_equal(config.out, run(replace(config, out=tmp_path / "whole")).directory)
