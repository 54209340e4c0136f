"""A run goes on with the settings that decide its result, and with no others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlsae.base.errors import InputError
from mlsae.base.settings import deciding, described, setting, settings
from mlsae.store import open_store
from mlsae.train import TrainConfig, run
from mlsae.train.plan import RunPlan, make_plan
from mlsae.train.running.output import claim

RELU = {"architecture": "relu", "l1": 0.1}
JUMP = {"architecture": "jumprelu"}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "site": ({"site": "resid_post"}, {"site": "resid_pre"}),
    "layers": ({}, {"layers": (0, 3)}),
    "validation_fraction": ({}, {"validation_fraction": 0.2}),
    "skip_positions": ({}, {"skip_positions": 2}),
    "data_seed": ({}, {"data_seed": 5}),
    "window": ({}, {"window": 60_000}),
    "architecture": ({"architecture": "topk"}, RELU),
    "expansion_factor": ({}, {"expansion_factor": 3}),
    "num_latents": ({}, {"num_latents": 50}),
    "normalize": ({}, {"normalize": "none"}),
    "layer_scale": ({"normalize": "none"}, {"layer_scale": "linear"}),
    "seed": ({"data_seed": 0}, {"seed": 1}),
    "preset": ({}, {"preset": "paper"}),
    "loss_space": ({}, {"loss_space": "raw"}),
    "layer_weights": ({}, {"layer_weights": (1.0, 2.0, 1.0)}),
    "batch_size": ({}, {"batch_size": 90}),
    "epochs": ({}, {"epochs": 2}),
    "max_rows": ({}, {"max_rows": 60}),
    "lr": ({}, {"lr": 0.5}),
    "schedule": ({}, {"schedule": "cosine"}),
    "lr_decay": ({}, {"lr_decay": 0.5}),
    "warmup": ({}, {"warmup": 0.5}),
    "clip_grad_norm": ({}, {"clip_grad_norm": 1.0}),
    "precision": ({}, {"precision": "bfloat16"}),
    "k": ({}, {"k": 3}),
    "l1": (RELU, {"l1": 0.2}),
    "l1_warmup": (RELU, {"l1_warmup": 0.5}),
    "layer_l1": (RELU, {"layer_l1": (1.0, 2.0, 1.0)}),
    "resample_every": (RELU, {"resample_every": 3}),
    "matryoshka": ({}, {"matryoshka": (2,)}),
    "threshold": ({"architecture": "batchtopk"}, {"threshold": "layer"}),
    "target_l0": (JUMP, {"target_l0": 3.0}),
    "l0_penalty": (JUMP, {"l0_penalty": 0.01}),
    "l0_warmup": (JUMP, {"l0_warmup": 0.5}),
    "initial_threshold": (JUMP, {"initial_threshold": 0.5}),
    "bandwidth": (JUMP, {"bandwidth": 2.0}),
    "straight_through": (JUMP, {"straight_through": "both"}),
}
"""Deciding setting → settings of a run, and a change of that one."""


@pytest.fixture
def basis(sample_maker: Any, tmp_path: Path) -> dict[str, Any]:
    """Settings of a small run, given to each of the tests."""
    store = sample_maker("acts").path
    common = {"batch_size": 60, "k": 2, "expansion_factor": 2, "device": "cpu"}
    return {"cache": store, "out": tmp_path / "run", **common}


@pytest.mark.parametrize("name", deciding(TrainConfig))
def test_another_value_of_a_deciding_setting_is_refused(
    name: str, basis: dict[str, Any], sample_maker: Any
) -> None:
    """A run with the record of its settings is not resumed with any other of them."""
    if name == "cache":
        before, change = {}, {"cache": sample_maker("other", seed=1).path}
    else:
        before, change = OTHERS[name]
    if name == "num_latents":
        basis["expansion_factor"] = None
    config = TrainConfig(**{**basis, **before})
    settings = make_plan(config, open_store(config.cache)).settings()
    claim(config.out, settings)
    if name == "site":
        with pytest.raises(InputError, match="does not hold site resid_pre"):
            run(replace(config, **change, resume=True))
        assert settings["site"] == "resid_post"
        return
    if name == "preset":
        # A run of the preset keeps no checkpoints, so it is never resumed.
        other = make_plan(replace(config, **change), open_store(config.cache))
        assert other.settings() == {**settings, "preset": "paper"}
        return
    with pytest.raises(InputError, match="holds another run: ") as caught:
        run(replace(config, **change, resume=True))
    assert " there, " in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"micro_batch": 7}, {"keep": 3}, {"checkpoint_seconds": 1.0}, {"track": "tensorboard"}],
)
def test_other_settings_are_no_part_of_the_identity(
    change: dict[str, Any], basis: dict[str, Any]
) -> None:
    """Those that say how a run is done, and not what comes of it."""
    config = TrainConfig(**basis)
    store = open_store(config.cache)
    other = replace(config, **change)
    assert make_plan(other, store).settings() == make_plan(config, store).settings()
    assert not {*change} & {*deciding(TrainConfig)}


def test_the_identity_is_what_it_was(basis: dict[str, Any]) -> None:
    """Keys of records, which runs of earlier versions have; relu has the settings of its own."""
    store = open_store(basis["cache"])
    topk = make_plan(TrainConfig(**basis), store).settings()
    assert {*topk} == {
        *("store_id", "site", "layers", "d_in", "num_latents", "k", "normalize", "batch_size"),
        *("num_steps", "num_rows", "slice_rows", "lr", "schedule", "lr_decay", "warmup"),
        *("validation_fraction", "skip_positions", "loss_space", "k_aux", "dead_after", "seed"),
        *("data_seed", "clip_grad_norm", "precision"),
    }
    relu = make_plan(TrainConfig(**{**basis, **RELU}), store).settings()
    added = {"architecture", "encoder_bias", "l1", "l1_warmup", "resample_every"}
    assert {*relu} == {*topk} - {"k"} | added


def test_a_new_deciding_setting_is_part_of_the_identity(
    basis: dict[str, Any],
) -> None:
    """Without another line of code; at its default it is left out, so that older runs go on."""

    @settings
    class Wider(TrainConfig):
        momentum: float = setting(default=0.5, decides=True, group="Optimisation", doc="Momentum.")
        colour: str = setting(default="red", decides=False, group="Run", doc="Colour.")

    assert "momentum" in described(Wider)
    store = open_store(basis["cache"])

    def identity(**more: Any) -> dict[str, Any]:
        plan: RunPlan = make_plan(Wider(**basis, **more), store)
        return plan.settings()

    assert identity(colour="blue") == identity()
    assert identity(momentum=0.9) == {**identity(), "momentum": 0.9}
