"""Gated: its loss and steps against their formulas, dense and in float64, and its JumpReLU form."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mlsae.sae import SAE, SAEConfig
from mlsae.sae.architectures import Gated, JumpReLU
from mlsae.sae.architectures.gated import GatedLoss
from mlsae.sae.architectures.relu import L1
from mlsae.train.data.loader import Batch
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.objective import Objective
from mlsae.train.step.resample import Candidates, resample
from mlsae.train.step.schedule import Schedule
from mlsae.train.step.trainer import Trainer

D, N, L, ROWS, STEPS = 12, 64, 3, 50, 50
VARIANCES = np.array([3.0, 7.0, 11.0])
WEIGHTS = (1.0, 0.5, 2.0)
SCHEDULE = Schedule(3e-3, STEPS, 0.1, 0.2)


def make_sae(gate: float) -> SAE:
    sae = SAE(SAEConfig(d_in=D, num_latents=N, architecture=Gated()), seeded()).double()
    with torch.no_grad():
        sae.b.copy_(torch.linspace(-0.3, 0.3, D))
        sae.W_dec.mul_(torch.linspace(0.5, 2, N)[:, None])
        sae.get_parameter("r_mag").copy_(torch.linspace(-1, 1, N))
        sae.get_parameter("b_gate").copy_(gate + torch.linspace(-0.1, 0.1, N))
        sae.get_parameter("b_mag").copy_(torch.linspace(0.2, -0.2, N))
    return sae


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make_trainer(sae: SAE) -> Trainer:
    objective = Objective(
        sae,
        VARIANCES,
        "standardized",
        layer_weights=WEIGHTS,
        extra=GatedLoss(penalty=L1(weight=0.03, rise=10)),
    )
    dead = DeadLatents(N, 10**9, torch.device("cpu"))
    return Trainer(sae, objective, SCHEDULE, dead, Accelerator(cpu=True))


def batches(steps: int = STEPS) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(ROWS, D, generator=generator, dtype=torch.float64)
        x[:3] = 0
        layer = torch.randint(L, (ROWS,), generator=generator)
        yield Batch(x * (1 + 3 * layer[:, None]) + layer[:, None], layer, ROWS)


@pytest.mark.parametrize("gate", [0.0, -1.0], ids=["many latents", "few latents"])
def test_fifty_steps_equal_dense_autograd(gate: float) -> None:
    """Losses, gradients and parameters to 1e-9; the decoder has no part in the gates' own error."""
    trainer = make_trainer(make_sae(gate))
    params = [p.detach().clone().requires_grad_() for p in trainer.sae.parameters()]
    adam = torch.optim.Adam(params, betas=(0.9, 0.999), eps=6.25e-10)
    W_enc, W_dec, b, r_mag, b_gate, b_mag = params
    weights = torch.tensor(WEIGHTS, dtype=torch.float64) / torch.from_numpy(VARIANCES)
    for step, batch in enumerate(batches()):
        u = (batch.x - batch.x.mean(1, keepdim=True)) / (batch.x.std(1, keepdim=True) + 1e-5)
        inner = (u - b) @ W_enc.T
        gates = inner + b_gate
        z = (gates > 0) * (r_mag.exp() * inner + b_mag).relu()
        of_gates = gates.relu() @ W_dec.detach() + b.detach()
        errors = (u - (z @ W_dec + b)).square().sum(1) + (u - of_gates).square().sum(1)
        cost = 0.03 * min(1, step / 10) * (gates.relu() * W_dec.norm(dim=1)).sum(1)
        loss = (weights[batch.layer] * errors + cost).mean()
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = SCHEDULE(step)
        adam.step()
        found = trainer.step(batch)
        np.testing.assert_allclose(found.loss, loss.item(), rtol=1e-9)
        for mine, dense in zip(trainer.sae.parameters(), params, strict=True):
            torch.testing.assert_close(mine.grad, dense.grad, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(mine, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalize", ["standardize", "center"])
@pytest.mark.parametrize("gate", [0.0, -1.0], ids=["many latents", "few latents"])
def test_the_form_that_is_kept_computes_the_same(gate: float, normalize: str) -> None:
    """JumpReLU's latents and reconstructions to 1e-12, its thresholds at 0 in part."""
    sae = make_sae(gate)
    if normalize == "center":
        weights = {name: p.detach() for name, p in sae.named_parameters()}
        config = SAEConfig(
            d_in=D, num_latents=N, architecture=Gated(), normalize="center", layers=(4, 5, 6)
        )
        sae = SAE(config, weights=weights)
        assert sae.layer_shift is not None
        sae.layer_shift = sae.layer_shift.double() + 0.3
    kept, record = sae.kept()
    assert kept.architecture == JumpReLU()
    threshold = kept.get_parameter("threshold")
    assert 0 < (threshold == 0).sum() < N or gate < 0
    x = torch.cat([batch.x for batch in batches(10)])
    layers = None if normalize == "standardize" else 5
    dense = []
    for one in (sae, kept):
        latents = one.encode(x, layers)
        z = torch.zeros(len(x), N, dtype=torch.float64)
        dense.append(z.scatter(1, latents.indices, latents.values))
        dense.append(one.decode(latents))
    assert (dense[0] != 0).sum() > len(x)
    torch.testing.assert_close(dense[2], dense[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(dense[3], dense[1], rtol=0, atol=1e-12)
    assert record["gates"].keys() == {"r_mag", "b_gate"}


def test_the_record_and_the_weights_give_the_gates_back() -> None:
    """W_enc = e^−r W_enc', b_mag = b_enc', and b_gate as it is recorded."""
    sae = make_sae(-0.3)
    kept, record = sae.kept()
    gates = record["gates"]
    factor = gates["r_mag"].exp()
    assert kept.b_enc is not None
    torch.testing.assert_close(kept.W_enc / factor[:, None], sae.W_enc)
    torch.testing.assert_close(kept.b_enc, sae.get_parameter("b_mag"))
    torch.testing.assert_close(gates["b_gate"], sae.get_parameter("b_gate"))


def test_a_latent_that_is_drawn_anew_has_no_gates_of_its_own() -> None:
    """r, b_gate and b_mag are 0 again, for the drawn ones alone."""
    sae = make_sae(-0.3)
    trainer, dead = make_trainer(sae), torch.tensor([3, 9])
    pieces = [Candidates(torch.tensor([1.0, 2.0]).double(), torch.eye(2, D).double())]
    resample(sae, trainer.optimizer, dead, pieces, 0, 1, lambda tensor: tensor)
    for name in ("r_mag", "b_gate", "b_mag"):
        values = sae.get_parameter(name)
        assert (values == 0).nonzero()[:, 0].tolist() == dead.tolist()
