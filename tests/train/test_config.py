"""Settings that a run refuses before it starts, one line each, and its defaults."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlsae.base.errors import InputError, ResourceError
from mlsae.base.machine.resources import available_memory
from mlsae.sae import TopK
from mlsae.store import IncompleteStoreError, NotAStoreError, create, open_store
from mlsae.train import TrainConfig, run
from mlsae.train.plan import make_plan

HERE = {"cache": Path("acts"), "out": Path("run")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expansion_factor": 4, "num_latents": 64}, "give --expansion-factor or --num-latents, n"),
        ({"epochs": 1, "max_rows": 64}, "give --epochs or --max-rows, not both"),
        ({"k": 0}, "-k must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"lr": 0.0}, r"--lr must be above 0, got 0\.0"),
        ({"lr": math.nan}, "--lr must be above 0, got nan"),
        ({"lr_decay": 1.5}, r"--lr-decay is a share of the steps from 0 to 1, got 1\.5"),
        ({"seed": -1}, r"--seed must be from 0 to 2\^63 - 1, got -1"),
        ({"data_seed": 2**63}, r"--data-seed must be from 0 to 2\^63 - 1, got 9223372036854775808"),
        ({"loss_space": "u"}, "--loss-space must be standardized or raw, got 'u'"),
        ({"precision": "float16"}, "--precision must be float32 or bfloat16, got 'float16'"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """The flag, what it takes and what it got."""
    with pytest.raises(InputError, match=message):
        TrainConfig(**HERE, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (0, 2)}, "does not hold layer 2; it has 0, 1, 3"),
        ({"site": "mlp_out"}, "does not hold site mlp_out"),
        ({"num_latents": 20, "k": 21}, "k must be at most num_latents: got k 21 and 20 latents"),
        ({"batch_size": 2}, "at least the number of layers: got 2 rows for 3 layers"),
        ({"skip_positions": 17}, r"skip[-_]positions must be"),
        ({"validation_fraction": 1.0}, "validation fraction must be at least 0 and below 1"),
        ({"window": 1000}, "--window must hold at least one row for each row of a batch"),
        ({"device": "tpu"}, "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_what_does_not_fit_the_store_is_refused_and_nothing_is_made(
    settings: dict[str, Any], message: str, sample: Any, tmp_path: Path
) -> None:
    """One line, and no directory."""
    values: dict[str, Any] = {"device": "cpu", "batch_size": 60, "k": 2, **settings}
    with pytest.raises(InputError, match=message) as caught:
        run(TrainConfig(cache=sample.path, out=tmp_path / "run", **values))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_errors_of_the_store_pass_through(tmp_path: Path) -> None:
    """No store, and a store that is not finished."""
    with pytest.raises(NotAStoreError):
        run(TrainConfig(cache=tmp_path / "none", out=tmp_path / "run", device="cpu"))
    tokens = np.ones(64, np.int64)
    create(tmp_path / "acts", tokens=tokens, context_length=8, layers=(0,), d_model=4).close()
    with pytest.raises(IncompleteStoreError):
        run(TrainConfig(cache=tmp_path / "acts", out=tmp_path / "run", device="cpu"))
    assert not (tmp_path / "run").exists()


def test_cuda_that_is_absent_is_refused(sample: Any, tmp_path: Path) -> None:
    """With the device to use instead."""
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises(ResourceError, match=r"--device cuda:0 was asked for, .* use --device cpu"):
        run(TrainConfig(cache=sample.path, out=tmp_path / "run", device="cuda:0"))


def test_too_little_memory_is_refused_with_the_numbers(sample: Any, tmp_path: Path) -> None:
    """Weights larger than the machine: each purpose is named."""
    latents = available_memory() // (20 * 4 * 2)
    with pytest.raises(
        ResourceError, match=r"not enough memory for training \(window .*, weights .*, Adam"
    ):
        run(TrainConfig(cache=sample.path, out=tmp_path / "run", num_latents=latents, device="cpu"))
    assert not (tmp_path / "run").exists()


def test_defaults_are_those_of_the_literature(sample: Any) -> None:
    """R 64, k 32, one epoch, lr 2e-4 / √(latents / 2¹⁴) in long runs, decay over 20%."""
    config = TrainConfig(cache=sample.path, out=Path("run"))
    plan = make_plan(config, open_store(sample.path))
    assert plan.sae.num_latents == 64 * 20
    assert plan.sae.architecture == TopK(32)
    assert plan.num_rows == plan.mixture.epoch_rows
    assert config.peak_lr(1280, 20, 10**8) == pytest.approx(2e-4 / math.sqrt(1280 / 16384))
    settings = plan.settings()
    wanted = {"batch_size": 512, "warmup": 0.1, "lr_decay": 0.2, "skip_positions": 1}
    assert {name: settings[name] for name in wanted} == wanted
    assert settings["loss_space"] == "standardized"


def test_the_learning_rate_rises_as_runs_get_shorter(sample: Any) -> None:
    """By the root of the steps, from where it is the published one down to 2,048 steps."""
    config = TrainConfig(cache=sample.path, out=Path("run"))
    published = 2e-4
    for d_in, num_steps, factor in [
        (512, 2**16, 1),
        (512, 2**16 + 1, 1),
        (512, 2**14, 2),
        (512, 2**12, 4),
        (64, 2**11, 16),
        (64, 1, 16),
        (4096, 2**11, 2),
        (4096, 2**13, 1),
    ]:
        assert config.peak_lr(2**14, d_in, num_steps) == pytest.approx(factor * published)
    assert replace(config, lr=1e-5).peak_lr(2**14, 64, 1) == 1e-5
    plan = make_plan(config, open_store(sample.path))
    assert plan.schedule.peak == config.peak_lr(1280, 20, plan.num_steps)


@pytest.mark.parametrize(
    ("given", "epoch_rows", "wanted"),
    [
        ({}, 1, 512),
        ({}, 2000 * 1024 - 1, 512),
        ({}, 2000 * 1024, 1024),
        ({"epochs": 3}, 700 * 1024, 1024),
        ({"max_rows": 2000 * 8192}, 1, 8192),
        ({}, 2000 * 16384, 16384),
        ({}, 10**12, 16384),
    ],
)
def test_a_batch_leaves_2000_steps(given: dict[str, int], epoch_rows: int, wanted: int) -> None:
    """By halves from 16,384 rows down to 512, whatever sets the length of the run."""
    config = TrainConfig(cache=Path("acts"), out=Path("run"), **given)
    assert config.batch_rows(epoch_rows) == wanted


@pytest.mark.parametrize(
    ("num_sequences", "wanted"),
    [(37, 0.05), (1280, 0.05), (3200, 0.02), (6400, 0.01), (10**9, 0.01)],
)
def test_64_sequences_are_held_out_or_5_percent(num_sequences: int, wanted: float) -> None:
    """The smaller of both, and never under 1%; a share that is given stands."""
    config = TrainConfig(cache=Path("acts"), out=Path("run"))
    assert config.held_out_fraction(num_sequences) == pytest.approx(wanted)
    chosen = TrainConfig(cache=Path("acts"), out=Path("run"), validation_fraction=0.0)
    assert chosen.held_out_fraction(num_sequences) == 0.0


def test_defaults_that_follow_from_the_store_are_resolved(sample: Any) -> None:
    """The identity of a run has the batch and the share that it trains with."""
    plan = make_plan(TrainConfig(cache=sample.path, out=Path("run")), open_store(sample.path))
    given = TrainConfig(
        cache=sample.path, out=Path("run"), batch_size=512, validation_fraction=0.05
    )
    assert plan.settings() == make_plan(given, open_store(sample.path)).settings()
    assert len(plan.validation) == 2


@pytest.mark.parametrize(
    ("asked", "epochs", "more_steps", "more_rows"),
    [
        (lambda _: {"epochs": 3}, 3, 0, 0),
        (lambda _: {"max_rows": 60}, 0, 1, 60),
        (lambda _: {"max_rows": 61}, 0, 2, 120),
        (lambda epoch: {"max_rows": epoch}, 1, 0, 0),
        (lambda epoch: {"max_rows": 2 * epoch + 1}, 2, 1, 60),
    ],
)
def test_a_run_ends_after_whole_batches(
    asked: Callable[[int], dict[str, int]],
    epochs: int,
    more_steps: int,
    more_rows: int,
    sample: Any,
) -> None:
    """Epochs are exact, their last batch short; a number of rows is rounded up to a batch."""
    store = open_store(sample.path)
    basis: dict[str, Any] = {"cache": sample.path, "out": Path("run"), "batch_size": 60}
    mixture = make_plan(TrainConfig(**basis), store).mixture
    plan = make_plan(TrainConfig(**basis, **asked(mixture.epoch_rows)), store)
    assert plan.num_rows == epochs * mixture.epoch_rows + more_rows
    assert plan.num_steps == epochs * -(-mixture.epoch_rows // 60) + more_steps
