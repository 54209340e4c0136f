"""Training finds the directions of data that was made from known ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mlsae.sae import SAE, ReLU, SAEConfig, TopK
from mlsae.sae.architectures.relu import L1
from mlsae.sae.kernels.select import select, select_mixed
from mlsae.train.data.loader import Batch
from mlsae.train.step import auxiliary
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.objective import Objective
from mlsae.train.step.resample import Resampling
from mlsae.train.step.schedule import Schedule
from mlsae.train.step.trainer import Trainer

D, N, K, ROWS = 64, 256, 8, 1024


class Planted:
    """Rows of 8 of 256 unit Gaussian directions, with magnitudes from 1 to 2."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(N, D, generator=self._generator)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.variance = self.rows(20_000).var(0).sum().item()

    def rows(self, num_rows: int) -> torch.Tensor:
        at = torch.rand(num_rows, N, generator=self._generator).topk(K, dim=1).indices
        magnitudes = 1 + torch.rand(num_rows, K, generator=self._generator)
        return torch.bmm(magnitudes[:, None], self.directions[at])[:, 0]


def train(sae: SAE, data: Planted, steps: int, dead_after: int, *, mixed: bool = False) -> None:
    objective = Objective(sae, np.array([float(D)]), "standardized", mixed=mixed)
    dead = DeadLatents(N, dead_after, torch.device("cpu"))
    schedule = Schedule(1e-3, steps, 0.01, 0.2)
    trainer = Trainer(sae, objective, schedule, dead, Accelerator(cpu=True))
    layer = torch.zeros(ROWS, dtype=torch.int64)
    for _ in range(steps):
        trainer.step(Batch(data.rows(ROWS), layer, ROWS))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def new_sae() -> SAE:
    return SAE(SAEConfig(d_in=D, num_latents=N, architecture=TopK(K)), seeded())


def fvu(sae: SAE, x: torch.Tensor) -> float:
    with torch.no_grad():
        return ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.mark.slow
def test_bfloat16_selects_and_learns_as_float32_does() -> None:
    """After 1,000 steps FVU within 1%, and 99.9% of the pairs equal the exact selection."""
    reached = []
    for mixed in (False, True):
        sae, data = new_sae(), Planted()
        train(sae, data, 1000, 10**9, mixed=mixed)
        reached.append(fvu(sae, data.rows(20_000)))
    assert reached[0] < 0.5 * fvu(new_sae(), data.rows(20_000))
    assert abs(reached[1] / reached[0] - 1) < 0.01
    with torch.no_grad():
        c = sae.standardize(data.rows(20_000)).u - sae.b
        pre, exact = select(c, sae.W_enc, K)
        _, mixed_indices = select_mixed(c, sae.W_enc, K)
    equal = (exact[:, :, None] == mixed_indices[:, None, :]).any(dim=2)
    assert equal[pre > 0].double().mean() >= 0.999


@pytest.mark.slow
def test_the_sampled_auxk_revives_what_the_full_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the encoder rows no longer finds its data; 2,000 steps bring nine tenths back.

    A sixteenth of 1,024 rows is less than AuxK takes from so small a batch: the minimum is lowered.
    """
    gone = torch.arange(N) % 4 == 0
    revived = []
    for share, rows, dead_after in ((1.0, ROWS, 50), (1 / 16, ROWS // 16, 50), (1.0, ROWS, 10**9)):
        monkeypatch.setattr(auxiliary, "SAMPLE_SHARE", share)
        monkeypatch.setattr(auxiliary, "SAMPLE_ROWS", rows)
        sae, data = new_sae(), Planted()
        with torch.no_grad():
            sae.W_enc[gone] *= -0.05
        train(sae, data, 2000, dead_after * ROWS)
        latents = sae.encode(data.rows(20_000))
        used = torch.zeros(N, dtype=torch.bool)
        used[latents.indices[latents.values > 0]] = True
        revived.append(int((used & gone).sum()))
    full, sampled, without = revived
    assert full >= 48
    assert without < full / 4
    assert sampled >= 0.9 * full


def recovered(sae: SAE, data: Planted) -> float:
    """The mean over planted directions of the largest |cosine| with a decoder row."""
    W = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    return (data.directions @ W.T).abs().amax(dim=1).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_planted_directions_are_found(architecture: str) -> None:
    """The mean largest |cosine| is at least 0.9 within 3,000 steps; untrained, it is printed."""
    steps, data = 3000, Planted()
    if architecture == "topk":
        sae = SAE(
            SAEConfig(d_in=D, num_latents=N, architecture=TopK(K), normalize="none"), seeded()
        )
        objective = Objective(sae, np.array([data.variance]), "standardized")
        dead = DeadLatents(N, 100 * ROWS, torch.device("cpu"))
    else:
        config = SAEConfig(
            d_in=D, num_latents=N, architecture=ReLU(), normalize="none", encoder_bias=True
        )
        sae = SAE(config, seeded())
        objective = Objective(
            sae,
            np.array([data.variance]),
            "standardized",
            extra=L1(weight=0.02, rise=150),
            resampling=Resampling(steps // 8, steps),
        )
        dead = DeadLatents(N, steps // 16 * ROWS, torch.device("cpu"))
    untrained = recovered(sae, data)
    schedule = Schedule(3e-3, steps, 0.01, 0.2)
    trainer = Trainer(sae, objective, schedule, dead, Accelerator(cpu=True))
    layer = torch.zeros(ROWS, dtype=torch.int64)
    for _ in range(steps):
        trainer.step(Batch(data.rows(ROWS), layer, ROWS))
    found = recovered(sae, data)
    print(f"{architecture}: mean largest |cosine| {untrained:.3f} untrained, {found:.3f} trained")
    assert untrained < 0.6
    assert found >= 0.9
