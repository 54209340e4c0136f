"""kill -9 at random instants of a real training run, again and again, until it is done."""

import json
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

NUM_KILLS = {"one": 20, "sweep": 10}
CHAIN = 5
"""Kills of one run before it may finish."""
SWEEP = ("k8", "k4")
VALUES = {"one": (), "sweep": ("-k", "4")}


def command(kit: Any, store: Path, out: Path, *more: str) -> list[object]:
    return [
        *kit.MLSAE, "train", "--cache", store, "--out", out, "--num-latents", "96", "-k", "8",
        "--batch-size", "64", "--epochs", "3", "--lr", "2e-3", "--validation-fraction", "0.1",
        "--device", "cpu", "--checkpoint-seconds", "0", *more,
    ]  # fmt: skip


def saes(out: Path, kind: str) -> list[Path]:
    return [out / name for name in SWEEP] if kind == "sweep" else [out]


def state_of(directory: Path) -> str:
    """State in which a kill left an SAE."""
    if (directory / "config.json").exists():
        return "finished"
    if list(directory.glob("checkpoints/*.json")):
        return "checkpoint"
    return "claimed" if (directory / "run.json").exists() else "nothing"


def assert_equal(killed: Path, whole: Path) -> None:
    """Weights bit for bit, metrics, the log but for its times, and no file more or less."""
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())
    ours, theirs = (load_file(directory / "sae.safetensors") for directory in (killed, whole))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    for name in ("log.jsonl", "training.json"):
        lines = [
            [_untimed(line) for line in (directory / name).read_text().splitlines()]
            for directory in (killed, whole)
        ]
        assert lines[0] == lines[1]


def _untimed(line: str) -> dict[str, Any]:
    content = json.loads(line)
    for name in ("rows_per_second", "environment", "sha256"):
        content.pop(name, None)
    return dict(content)


@pytest.mark.parametrize("kind", VALUES)
def test_killed_at_random_instants_it_ends_as_the_unbroken_run(
    kind: str, kit: Any, counts: Any, unbroken: Path, tmp_path: Path
) -> None:
    whole, found = tmp_path / "whole", Counter[str]()
    began = time.monotonic()
    done = kit.run(command(kit, unbroken, whole, *VALUES[kind]))
    assert done.returncode == 0, done.stderr
    seconds = time.monotonic() - began

    def chain(number: int) -> int:
        generator, kills = random.Random(number), 0
        out = tmp_path / f"out{number}"
        words = command(kit, unbroken, out, *VALUES[kind], "--resume")
        for _ in range(CHAIN):
            process = kit.start(words)
            time.sleep(generator.random() * seconds)
            process.send_signal(signal.SIGKILL)
            _, errors = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), errors
            if process.returncode:
                kills += 1
                found.update(state_of(directory) for directory in saes(out, kind))
        done = kit.run(words)
        assert done.returncode == 0, done.stderr
        for killed, other in zip(saes(out, kind), saes(whole, kind), strict=True):
            assert_equal(killed, other)
        return kills

    kills, number = 0, 0
    while kills < NUM_KILLS[kind]:
        kills += sum(kit.side_by_side(chain, range(number, number + kit.WORKERS)))
        number += kit.WORKERS
    assert found["checkpoint"] > 0, found
    counts.add(f"kills of training, {kind}", kills=kills, runs=number, **found)
