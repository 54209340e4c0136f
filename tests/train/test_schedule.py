"""Learning rates and clipped gradients."""

import math
from typing import Any

import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.train import TrainConfig
from mlsae.train.step.optimizer import Optimizer
from mlsae.train.step.schedule import Schedule


def rates(**settings: Any) -> list[float]:
    config = TrainConfig(cache="acts", out="run", **settings)  # type: ignore[arg-type]
    schedule = Schedule(2.0, 100, config.warmup, config.decay, config.schedule)
    return [schedule(step) for step in range(101)]


def test_a_constant_rate_stays() -> None:
    """After its warm-up, to the last step."""
    found = rates(schedule="constant", warmup=0.1)
    assert found[:2] == pytest.approx([2 / 11, 4 / 11])
    assert found[10:100] == [2.0] * 90


def test_a_cosine_falls_from_the_end_of_the_warm_up() -> None:
    """Half of the peak in the middle, 0 after the last step."""
    found = rates(schedule="cosine", warmup=0.1)
    wanted = [1 + math.cos(math.pi * (step - 9) / 91) for step in range(10, 101)]
    assert found[10:] == pytest.approx(wanted)
    assert found[100] == 0


def test_a_cosine_falls_over_the_share_asked_for() -> None:
    """A plateau before it."""
    found = rates(schedule="cosine", warmup=0.0, lr_decay=0.2)
    assert found[:80] == [2.0] * 80
    assert found[80:] == pytest.approx([1 + math.cos(math.pi * (s + 1) / 21) for s in range(21)])


def test_a_constant_rate_with_a_decay_is_refused() -> None:
    """Both flags are named."""
    with pytest.raises(InputError, match=r"a constant --schedule has no decay, got --lr-decay 0\."):
        rates(schedule="constant", lr_decay=0.1)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_gradients_are_clipped_together(max_norm: float) -> None:
    """As if they had been shorter by one factor; those within the norm stay as they are."""
    saes = [
        SAE(
            SAEConfig(d_in=8, num_latents=16, architecture=TopK(2)),
            torch.Generator().manual_seed(0),
        ).double()
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(1)
    for a, b in zip(*(sae.parameters() for sae in saes), strict=True):
        a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
        b.grad = a.grad.clone()
    gradients = [p.grad for p in saes[0].parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, max_norm / norm))
    Optimizer(saes[0]).step(1e-2)
    Optimizer(saes[1], max_norm).step(1e-2)
    for a, b in zip(*(sae.parameters() for sae in saes), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
