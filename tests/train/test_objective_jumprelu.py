"""JumpReLU: its loss and steps against their formulas, dense and in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mlsae.sae import SAE, SAEConfig
from mlsae.sae.architectures import JumpReLU, JumpReLUSettings
from mlsae.sae.architectures.base import TrainingRows
from mlsae.sae.kernels import above
from mlsae.train.data.loader import Batch
from mlsae.train.step import preactivation
from mlsae.train.step.auxiliary import Residual
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.objective import Objective
from mlsae.train.step.schedule import Schedule
from mlsae.train.step.trainer import Trainer

D, N, L, ROWS, STEPS = 12, 64, 3, 50, 50
VARIANCES = np.array([3.0, 7.0, 11.0])
SCHEDULE = Schedule(3e-3, STEPS, 0.1, 0.2)
TARGET, RISE = 25.0, 10


def make(dead_after: int = 10**9, **chosen: Any) -> Trainer:
    """In float64, with biases and thresholds of each latent."""
    architecture = JumpReLU()
    config = SAEConfig(d_in=D, num_latents=N, architecture=architecture, encoder_bias=True)
    sae = SAE(config, torch.Generator().manual_seed(0)).double()
    settings = architecture.resolved(JumpReLUSettings(l0_warmup=0.2, **chosen), config, 1.0)
    with torch.no_grad():
        architecture.prepare(sae.weights, settings)
        sae.b.copy_(torch.linspace(-0.3, 0.3, D))
        assert sae.b_enc is not None
        sae.b_enc.copy_(torch.linspace(-0.1, 0.1, N))
        sae.get_parameter("threshold").mul_(torch.linspace(0, 1.5, N))
    objective = Objective(
        sae,
        VARIANCES,
        "standardized",
        extra=architecture.extra_loss(settings, STEPS, sae.b),
        settings=settings,
    )
    dead = DeadLatents(N, dead_after, torch.device("cpu"))
    return Trainer(sae, objective, SCHEDULE, dead, Accelerator(cpu=True))


def batches(steps: int = STEPS) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(ROWS, D, generator=generator, dtype=torch.float64)
        x[:3] = 0  # Nothing but biases.
        layer = torch.randint(L, (ROWS,), generator=generator)
        yield Batch(x * (1 + 3 * layer[:, None]) + layer[:, None], layer, ROWS)


class Jump(torch.autograd.Function):
    """z and H of all entries, with the straight-through derivatives written out."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        h, theta, bandwidth, both = arguments
        ctx.save_for_backward(h, theta)
        ctx.settings = bandwidth, both
        return h * (h > theta), (h > theta).double()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, theta = ctx.saved_tensors
        bandwidth, both = ctx.settings
        kernel = ((h - theta).abs() < bandwidth / 2).double() / bandwidth
        estimated = (grads[0] * theta + grads[1]) * kernel
        of_h = grads[0] * (h > theta) + (estimated if both else 0)
        return of_h, -estimated.sum(dim=0), None, None


class Dense:
    """The formulas with dense tensors and torch's Adam."""

    def __init__(self, trainer: Trainer, **chosen: Any) -> None:
        self.params = [p.detach().clone().requires_grad_() for p in trainer.sae.parameters()]
        self.adam = torch.optim.Adam(self.params, betas=(0.9, 0.999), eps=6.25e-10)
        self.bandwidth = chosen.get("bandwidth", 0.5)
        self.both = chosen.get("straight_through") == "both"
        self.penalty = chosen.get("l0_penalty")
        self.aim = TARGET

    def step(self, batch: Batch, step: int) -> float:
        W_enc, W_dec, b, b_enc, theta = self.params
        u = (batch.x - batch.x.mean(1, keepdim=True)) / (batch.x.std(1, keepdim=True) + 1e-5)
        h = (u - b) @ W_enc.T + b_enc
        z, gate = Jump.apply(h, theta, self.bandwidth, self.both)  # type: ignore[no-untyped-call]
        errors = (u - (z @ W_dec + b)).square().sum(1) / torch.from_numpy(VARIANCES)[batch.layer]
        l0 = gate.sum(1)
        costs = ((l0 - self.aim) / TARGET) ** 2 if self.penalty is None else self.penalty * l0
        loss = (errors + min(1, step / RISE) * costs).mean()
        self.adam.zero_grad()
        loss.backward()
        assert W_dec.grad is not None
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            self.adam.param_groups[0]["lr"] = SCHEDULE(step)
            self.adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            theta.clamp_(min=0)
        off = TARGET - l0.mean().item()
        self.aim += 8 / STEPS * max(-0.05 * TARGET, min(0.05 * TARGET, off))
        return loss.item()


CASES: dict[str, dict[str, Any]] = {
    "target": {"target_l0": TARGET},
    "penalty": {"l0_penalty": 0.02, "bandwidth": 2.0},
    "both": {"target_l0": TARGET, "straight_through": "both", "bandwidth": 1.0},
}


@pytest.mark.parametrize(
    ("case", "block"),
    [("target", 8 * N * 7), ("penalty", above.BLOCK_BYTES), ("both", above.BLOCK_BYTES)],
)
def test_fifty_steps_equal_the_definition(
    case: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients and parameters to 1e-9; in search of many latents θ meets its bound 0."""
    monkeypatch.setattr(above, "BLOCK_BYTES", block)
    trainer = make(**CASES[case])
    dense = Dense(trainer, **CASES[case])
    for number, batch in enumerate(batches()):
        expected = dense.step(batch, number)
        found = trainer.step(batch)
        np.testing.assert_allclose(found.loss, expected, rtol=1e-9)
        for a, b in zip(trainer.sae.parameters(), dense.params, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert (trainer.sae.get_parameter("threshold").amin() == 0) == ("target_l0" in CASES[case])


def test_encoding_has_the_latents_that_training_has() -> None:
    """An entry in the window below θ has the value 0, and none below the window is listed."""
    trainer = make(target_l0=TARGET)
    sae, (batch,) = trainer.sae, batches(1)
    u = sae.standardize(batch.x).u
    settings = JumpReLU().resolved(JumpReLUSettings(), sae.config, 1.0)
    active = sae.activate_in_training(TrainingRows(u, batch.layer, 0, settings=settings))
    values, support = sae.activate(u)
    z = torch.zeros(ROWS, N, dtype=torch.float64)
    expected = z.scatter(1, support.indices_BK, values)
    rows = active.support.rows
    found = z.index_put((rows, active.support.indices_BK), active.values)
    torch.testing.assert_close(found, expected)
    assert active.gate is not None
    assert active.gate.sum() == (expected != 0).sum() < len(active.values)


def test_straight_through_gradients_are_those_of_the_smoothed_loss() -> None:
    """Finite differences in θ of a loss curved in z and in L0, in the mean over 40,000 rows.

    Pre-activations of two latents lie evenly about θ, and the window is so narrow that h is θ there
    to half a percent.
    """
    num, bandwidth, theta = 200, 0.01, 0.7
    architecture = JumpReLU()
    config = SAEConfig(d_in=2, num_latents=2, architecture=architecture, encoder_bias=True)
    sae = SAE(config).double()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.get_parameter("threshold").fill_(theta)
    grid = theta + 0.1 * ((torch.arange(num, dtype=torch.float64) + 0.5) / num - 0.5)
    u = torch.cartesian_prod(grid, grid)
    wanted = 1.3 * u[:, 0] + 0.2 * u[:, 1]

    def by_row(z: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return (wanted - z.sum(1)) ** 2 + (gate.sum(1) - 1.8) ** 2

    settings = architecture.resolved(JumpReLUSettings(bandwidth=bandwidth), config, 1.0)
    rows = TrainingRows(u, torch.zeros(len(u), dtype=torch.int64), 0, settings=settings)
    active = sae.activate_in_training(rows)
    at = (active.support.rows, active.support.indices_BK)
    empty = torch.zeros_like(u)
    assert active.gate is not None
    by_row(empty.index_put(at, active.values), empty.index_put(at, active.gate)).mean().backward()
    gradient = sae.get_parameter("threshold").grad
    assert gradient is not None

    def smoothed(latent: int, value: float) -> float:
        """The mean with H of one latent blurred by the rectangle: 1 with a share, else 0."""
        gate = (u > theta).double()
        share = ((u[:, latent] - value) / bandwidth + 0.5).clamp(0, 1)
        found = 0.0
        for on in (0.0, 1.0):
            gate[:, latent] = on
            found += float((by_row(u * gate, gate) * (share if on else 1 - share)).mean())
        return found

    for latent in range(2):
        slope = (smoothed(latent, theta + 1e-5) - smoothed(latent, theta - 1e-5)) / 2e-5
        assert gradient[latent].item() == pytest.approx(slope, rel=0.01)


def test_pieces_add_up() -> None:
    """Micro-batches of 7 give the steps of whole batches, dead latents included."""
    found = []
    for micro in (None, 7):
        trainer = make(dead_after=3 * ROWS, target_l0=3.0)
        trainer._micro_batch = micro
        for batch in batches(12):
            result = trainer.step(batch)
        assert result.num_dead > 0
        found.append([p.detach() for p in trainer.sae.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_pre_activation_loss_equals_its_definition() -> None:
    """Value and gradients against autograd, for dead latents alone, in blocks."""
    sae = make(target_l0=TARGET).sae
    dead = torch.tensor([1, 5, 40, 63])
    u = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pieces = [Residual(part, part) for part in (u[:20], u[20:20], u[20:])]
    found = preactivation.accumulate(sae, pieces, dead, lambda tensor: tensor)
    params = [p.detach().clone().requires_grad_() for p in sae.parameters()]
    W_enc, _, b, b_enc, theta = params
    h = (u - b) @ W_enc.T + b_enc
    expected = preactivation.COEFFICIENT * (theta - h).relu()[:, dead].sum() / ROWS
    torch.testing.assert_close(found, expected.detach())
    gradients = torch.autograd.grad(expected, params, allow_unused=True)
    for parameter, gradient in zip(sae.parameters(), gradients, strict=True):
        wanted = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(parameter.grad, wanted)


def test_dead_latents_come_back() -> None:
    """Thresholds above every pre-activation fall until rows use the latents."""
    trainer = make(dead_after=ROWS, target_l0=TARGET)
    with torch.no_grad():
        trainer.sae.get_parameter("threshold")[:4] = 3.5
    trainer.schedule = Schedule(5e-2, 200, 0, 0)
    for batch in itertools.islice(itertools.cycle(batches(10)), 40):
        trainer.step(batch)
    assert (trainer.dead.last_used[:4] > ROWS).all()
