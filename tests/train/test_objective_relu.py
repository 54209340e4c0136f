"""ReLU with an L1 penalty: the loss and its steps against their formulas, dense and in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mlsae.sae import SAE, ReLU, SAEConfig
from mlsae.sae.architectures.relu import L1
from mlsae.sae.kernels import above
from mlsae.sae.kernels.sparse import FullSupport
from mlsae.train.data.loader import Batch
from mlsae.train.step.auxiliary import hashed
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.objective import Objective
from mlsae.train.step.optimizer import Optimizer
from mlsae.train.step.resample import Candidates, Resampling, keys, resample
from mlsae.train.step.schedule import Schedule
from mlsae.train.step.trainer import Trainer

D, N, L, ROWS, STEPS = 12, 64, 3, 50, 50
VARIANCES = np.array([3.0, 7.0, 11.0])
WEIGHTS, MULTIPLIERS = (1.0, 0.5, 2.0), (1.0, 3.0, 0.0)
PENALTY = L1(weight=0.03, by_layer=torch.tensor(MULTIPLIERS, dtype=torch.float64), rise=10)
SCHEDULE = Schedule(3e-3, STEPS, 0.1, 0.2)


def make_sae(bias: float = 0.0) -> SAE:
    config = SAEConfig(d_in=D, num_latents=N, architecture=ReLU(), encoder_bias=True)
    sae = SAE(config, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        sae.b.copy_(torch.linspace(-0.3, 0.3, D))
        sae.W_dec.mul_(torch.linspace(0.5, 2, N)[:, None])
        assert sae.b_enc is not None
        sae.b_enc.copy_(bias + torch.linspace(-0.1, 0.1, N))
    return sae


def make_trainer(sae: SAE, dead_after: int = 10**9, every: int | None = None) -> Trainer:
    objective = Objective(
        sae,
        VARIANCES,
        "standardized",
        layer_weights=WEIGHTS,
        extra=PENALTY,
        resampling=None if every is None else Resampling(every, STEPS),
    )
    dead = DeadLatents(N, dead_after, torch.device("cpu"))
    return Trainer(sae, objective, SCHEDULE, dead, Accelerator(cpu=True))


def batches(steps: int = STEPS) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(ROWS, D, generator=generator, dtype=torch.float64)
        layer = torch.randint(L, (ROWS,), generator=generator)
        yield Batch(x * (1 + 3 * layer[:, None]) + layer[:, None], layer, ROWS)


class Dense:
    """The formulas with dense tensors, torch's own autograd and its Adam."""

    def __init__(self, sae: SAE) -> None:
        self.params = [p.detach().clone().requires_grad_() for p in sae.parameters()]
        self.adam = torch.optim.Adam(self.params, betas=(0.9, 0.999), eps=6.25e-10)

    def row_losses(self, batch: Batch, step: int) -> torch.Tensor:
        W_enc, W_dec, b, b_enc = self.params
        u = (batch.x - batch.x.mean(1, keepdim=True)) / (batch.x.std(1, keepdim=True) + 1e-5)
        z = ((u - b) @ W_enc.T + b_enc).relu()
        errors = (u - (z @ W_dec + b)).square().sum(1) / torch.from_numpy(VARIANCES)[batch.layer]
        weights, multipliers = torch.tensor([WEIGHTS, MULTIPLIERS], dtype=torch.float64)
        rise = 0.03 * min(1, step / 10) * multipliers[batch.layer]
        return weights[batch.layer] * errors + rise * (z * W_dec.norm(dim=1)).sum(1)

    def step(self, batch: Batch, step: int) -> float:
        loss = self.row_losses(batch, step).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.param_groups[0]["lr"] = SCHEDULE(step)
        self.adam.step()
        return loss.item()


@pytest.mark.parametrize("bias", [0.0, -0.8], ids=["many latents", "few latents"])
@pytest.mark.parametrize("block", [above.BLOCK_BYTES, 8 * N * 7], ids=["one block", "blocks"])
def test_fifty_steps_equal_dense_autograd(
    bias: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients and parameters to 1e-9: decoder rows of any length, λ rising, by layer."""
    monkeypatch.setattr(above, "BLOCK_BYTES", block)
    sae = make_sae(bias)
    trainer, dense = make_trainer(sae), Dense(sae)
    for number, batch in enumerate(batches()):
        expected = dense.step(batch, number)
        found = trainer.step(batch)
        np.testing.assert_allclose(found.loss, expected, rtol=1e-9)
        for a, b in zip(sae.parameters(), dense.params, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert (found.penalty > 0) == (number > 0)
    assert sae.W_dec.norm(dim=1).std() > 0.1


def test_both_ways_of_multiplying_are_taken() -> None:
    """Dense where latents are many, else at those in use."""
    x = next(batches(1)).x
    for bias, dense in ((0.0, True), (-2.5, False)):
        sae = make_sae(bias)
        _, support = sae.activate(sae.standardize(x).u)
        assert isinstance(support, FullSupport) == dense


def test_the_penalty_is_counted_apart_and_fvu_without_it() -> None:
    """Loss = weighted errors + penalty; `layer_errors` have neither weight nor penalty."""
    sae = make_sae()
    found = make_trainer(sae).step(next(batches(1)))
    x, layer, *_ = next(batches(1))
    u = sae.standardize(x).u
    fresh = make_sae()
    values, support = fresh.activate(u)
    errors = (u - fresh.reconstruct(values, support)).square().sum(1)
    expected = np.bincount(layer, errors.detach().numpy(), minlength=L) / VARIANCES
    np.testing.assert_allclose(found.layer_errors, expected, rtol=1e-9)
    assert found.penalty == 0
    assert found.num_active == (values > 0).sum()


def test_resampling_follows_the_published_rule() -> None:
    """Directions of drawn rows, a fifth of the living encoders' length, no bias, no moments."""
    sae = make_sae(-0.5)
    assert sae.b_enc is not None
    with torch.no_grad():
        sae.b_enc[::4] = -100
    trainer, dense = make_trainer(sae, dead_after=3 * ROWS, every=5), Dense(sae)
    for number, batch in enumerate(batches(5)):
        last, losses = batch, dense.row_losses(batch, number).detach()
        dense.step(batch, number)
        trainer.step(batch)
    dead = torch.arange(0, N, 4)
    b = dense.params[2].detach()
    u = make_sae().standardize(last.x).u
    uniform = (hashed(last.x, 0, 4).double() + 2**31 + 0.5) / 2**32
    # The smallest −log(r) / loss² first, against the b that the encoder saw.
    order = (-uniform.log() / losses.square()).argsort()[: len(dead)]
    living = torch.ones(N, dtype=torch.bool).index_fill(0, dead, value=False)
    length = dense.params[0].detach()[living].norm(dim=1).mean()
    c = u[order] - trainer_b_before_the_last_step(b, dense)
    directions = c / c.norm(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec[dead].detach(), directions, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        sae.W_enc[dead].detach(), 0.2 * length * directions, rtol=1e-9, atol=1e-9
    )
    assert (sae.b_enc[dead] == 0).all()
    torch.testing.assert_close(sae.W_enc[living], dense.params[0][living], rtol=1e-9, atol=1e-9)
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
        moments = trainer.optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            assert not moments[name][dead].any()
            assert moments[name][living].any()
    assert not len(trainer.dead.indices())


def trainer_b_before_the_last_step(b: torch.Tensor, dense: Dense) -> torch.Tensor:
    """Undo Adam's last step of b, from its moments."""
    state = dense.adam.state[dense.params[2]]
    t = int(state["step"])
    m, v = state["exp_avg"] / (1 - 0.9**t), state["exp_avg_sq"] / (1 - 0.999**t)
    return b + SCHEDULE(t - 1) * m / (v.sqrt() + 6.25e-10)


def test_resampling_is_due_in_the_first_half_alone() -> None:
    """At each eighth up to the half, as published."""
    due = [step for step in range(200) if Resampling(25, 200).due(step)]
    assert due == [24, 49, 74, 99]


def test_rows_are_drawn_in_proportion_to_the_square_of_their_loss() -> None:
    """The first draw, over many steps' hashes."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    losses = torch.tensor([1.0, 2.0, 3.0, 0.0])
    firsts = [int(keys(x, losses, 0, step).argmin()) for step in range(4000)]
    shares = np.bincount(firsts, minlength=4) / 4000
    np.testing.assert_allclose(shares, np.array([1, 4, 9, 0]) / 14, atol=0.03)


class Exchange:
    """Sums over ranks that run one after another: first they give, then they get."""

    def __init__(self) -> None:
        self.given: list[list[torch.Tensor]] = [[], []]
        self.gets = False
        self.calls = 0

    def total(self, mine: torch.Tensor) -> torch.Tensor:
        given = self.given[self.calls % 2]
        self.calls += 1
        if self.gets:
            return torch.stack(given).sum(0)
        given.append(mine)
        return mine


def test_ranks_draw_the_same_rows_as_one() -> None:
    """However the candidates are cut; and with fewer candidates than latents some are left."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(9, D, generator=generator, dtype=torch.float64)
    keys_R = torch.rand(9, generator=generator, dtype=torch.float64)
    keys_R[4] = torch.inf
    dead = torch.arange(3, 15)
    drawn = []
    for cuts in ((0, 9), (0, 2, 9)):
        exchange = Exchange()
        parts = [Candidates(keys_R[a:b], rows[a:b]) for a, b in itertools.pairwise(cuts)]
        for exchange.gets in (False, True):
            for rank, part in enumerate(parts):
                sae = make_sae()
                optimizer = Optimizer(sae)
                revived = resample(sae, optimizer, dead, [part], rank, len(parts), exchange.total)
                if exchange.gets:
                    assert revived.tolist() == list(range(3, 11))
                    drawn.append(sae.W_dec.detach())
    assert len(drawn) == 3
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
