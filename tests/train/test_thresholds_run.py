"""Runs of jumprelu and gated: stopped and resumed, in sweeps, and what they leave."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlsae.sae import load
from mlsae.sae.architectures import JumpReLU
from mlsae.train import TrainConfig, run, run_sweep
from mlsae.train.running.checkpoint import Checkpoints
from mlsae.train.step.trainer import Trainer
from mlsae.train.sweep import Sweep

SETTINGS: dict[str, Any] = {
    "num_latents": 64,
    "batch_size": 60,
    "lr": 3e-3,
    "validation_fraction": 0.1,
    "device": "cpu",
}
KINDS: dict[str, dict[str, Any]] = {
    "jumprelu": {"architecture": "jumprelu", "target_l0": 6.0},
    "gated": {"architecture": "gated", "l1": 0.01, "resample_every": 5},
}


class StopError(Exception):
    """Ends a run in the middle."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_exactly(
    kind: str, sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights to the bit; of jumprelu a checkpoint holds the aim, which has moved."""
    config: dict[str, Any] = {"cache": sample.path, **SETTINGS, **KINDS[kind]}
    whole = run(TrainConfig(**config, out=tmp_path / "whole"))
    original = Trainer.step

    def failing(self: Trainer, batch: Any) -> Any:
        if self.step_number == 11:
            raise StopError
        return original(self, batch)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        with pytest.raises(StopError):
            run(TrainConfig(**config, out=out, checkpoint_seconds=0))
    directory = out / "checkpoints"
    (last,) = [Checkpoints(directory).steps()[-1]]
    record = json.loads((directory / f"step-{last:010d}.json").read_text())
    assert ("extra_loss" in record) == (kind == "jumprelu")
    if kind == "jumprelu":
        assert record["extra_loss"]["aim"] != 6
    again = run(TrainConfig(**config, out=out, resume=True))
    for name, tensor in load_file(whole.directory / "sae.safetensors").items():
        assert torch.equal(tensor, load_file(again.directory / "sae.safetensors")[name]), name


def test_a_gated_run_leaves_a_jumprelu_sae_with_its_gates(sample: Any, tmp_path: Path) -> None:
    """Thresholds of every latent, r and b_gate in the record, and the settings of the run."""
    out = run(
        TrainConfig(cache=sample.path, out=tmp_path / "sae", **SETTINGS, **KINDS["gated"])
    ).directory
    sae = load(out)
    assert sae.architecture == JumpReLU()
    assert json.loads((out / "config.json").read_text())["architecture"] == "mlsae/jumprelu"
    assert sae.training_record["settings"]["architecture"] == "gated"
    gates = sae.training_record["gates"]
    r_mag, b_gate = (torch.tensor(gates[name]) for name in ("r_mag", "b_gate"))
    assert r_mag.any()
    assert sae.b_enc is not None
    expected = (sae.b_enc - r_mag.exp() * b_gate).clamp(min=0)
    torch.testing.assert_close(sae.get_parameter("threshold"), expected)


def test_targets_are_swept_and_each_layer_is_trained(sample: Any, tmp_path: Path) -> None:
    """A directory for each, with more latents a row for a larger target."""
    config = TrainConfig(
        cache=sample.path,
        out=tmp_path / "run",
        architecture="jumprelu",
        layers=(0, 3),
        max_rows=1200,
        **SETTINGS,
    )
    results = run_sweep(Sweep(config=config, axes={"target_l0": (2.0, 12.0)}, each_layer=True))
    names = [result.directory.name for result in results]
    assert names[0] == "target-l0-2-all"
    assert len(names) == 6
    used = {}
    for result in results:
        assert result.metrics is not None
        entries = result.metrics["position_0_out"]["layers"]
        used[result.directory.name] = sum(e["l0"] for e in entries) / len(entries)
    for name in names[: len(names) // 2]:
        assert used[name] < used[name.replace("l0-2-", "l0-12-")]
