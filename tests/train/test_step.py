"""Steps of training against dense autograd with torch's own Adam, however they are computed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.sae.kernels.select import select
from mlsae.train.data.loader import Batch
from mlsae.train.step import auxiliary
from mlsae.train.step.auxiliary import sample
from mlsae.train.step.dead import DeadLatents
from mlsae.train.step.objective import Objective
from mlsae.train.step.schedule import Schedule
from mlsae.train.step.trainer import Trainer

STEPS = 50
VARIANCES = np.array([3.0, 7.0])
SCHEDULE = Schedule(3e-3, STEPS, 0.1, 0.2)


def make_sae(
    num_latents: int = 64, k: int = 4, dtype: torch.dtype = torch.float64, d_in: int = 12
) -> SAE:
    generator = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_in=d_in, num_latents=num_latents, architecture=TopK(k)), generator).to(
        dtype
    )
    with torch.no_grad():
        sae.b.copy_(torch.linspace(-0.3, 0.3, d_in))
    sae.normalize_decoder()
    return sae


def make_trainer(
    sae: SAE, dead_after: int = 150, micro_batch: int | None = None, *, mixed: bool = False
) -> Trainer:
    objective = Objective(sae, VARIANCES, "standardized", mixed=mixed)
    dead = DeadLatents(sae.config.num_latents, dead_after, torch.device("cpu"))
    return Trainer(sae, objective, SCHEDULE, dead, Accelerator(cpu=True), micro_batch)


def batches(num_rows: int = 50, d_in: int = 12, steps: int = STEPS) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(num_rows, d_in, generator=generator, dtype=torch.float64)
        layer = torch.randint(2, (num_rows,), generator=generator)
        yield Batch(x + layer[:, None], layer, num_rows)


class Dense:
    """The formulas in float64 with dense tensors, at the places that it is given."""

    def __init__(self, sae: SAE) -> None:
        names = ("W_enc", "W_dec", "b")
        self.params = [
            getattr(sae, name).detach().double().clone().requires_grad_() for name in names
        ]
        self.adam = torch.optim.Adam(self.params, betas=(0.9, 0.999), eps=6.25e-10)

    def step(
        self, batch: Batch, at: torch.Tensor, dead: torch.Tensor, aux_at: torch.Tensor, lr: float
    ) -> float:
        W_enc, W_dec, b = self.params
        u = (batch.x - batch.x.mean(1, keepdim=True)) / (batch.x.std(1, keepdim=True) + 1e-5)
        pre = (u - b) @ W_enc.T
        z = torch.zeros_like(pre).scatter(1, at, pre.gather(1, at)).relu()
        e = u - (z @ W_dec + b)
        loss = (e.square().sum(1) / torch.from_numpy(VARIANCES)[batch.layer]).sum() / len(u)
        if len(dead):
            places = dead[aux_at]
            z_aux = torch.zeros_like(pre).scatter(1, places, pre.gather(1, places)).relu()
            left, scale = e.detach(), min(1, len(dead) / 8) / 32
            loss = loss + scale * (left - z_aux @ W_dec).square().sum() / left.square().sum()
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        return loss.item()


def choices(sae: SAE, batch: Batch, dead: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The places that are about to be selected, among all latents and among the dead ones."""
    indices = sae.encode(batch.x).indices
    if not len(dead):
        return indices, indices
    with torch.no_grad():
        c = sae.standardize(batch.x).u - sae.b
        return indices, select(c, sae.W_enc[dead], min(8, len(dead)))[1]


@torch.no_grad()
def tie(*encoders: torch.Tensor) -> None:
    """Every latent's encoder row is another one's, too."""
    for W in encoders:
        half = len(W) // 2
        W[half:] = W[:half]


@pytest.mark.parametrize(
    ("num_latents", "k", "num_rows", "dtype", "tolerance"),
    [
        (64, 4, 50, torch.float64, 1e-9),
        (20, 20, 50, torch.float64, 1e-9),
        (64, 4, 1, torch.float64, 1e-9),
        (1024, 4, 50, torch.float32, 1e-4),
        (20, 20, 50, torch.float32, 1e-4),
    ],
    ids=["usual", "k = num_latents", "one row", "float32", "float32, k = num_latents"],
)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_fifty_steps_equal_dense_autograd(
    num_latents: int, k: int, num_rows: int, dtype: torch.dtype, tolerance: float, ties: bool
) -> None:
    """Losses and, in float64, parameters; latents die on the way, unless all are always used."""
    sae = make_sae(num_latents, k, dtype)
    trainer, dense = make_trainer(sae, dead_after=3 * num_rows), Dense(sae)
    for number, batch in enumerate(batches(num_rows)):
        if ties:
            tie(sae.W_enc, dense.params[0])
        dead = trainer.dead.indices()
        at, aux_at = choices(sae, batch, dead)
        expected = dense.step(batch, at, dead, aux_at, SCHEDULE(number))
        np.testing.assert_allclose(trainer.step(batch).loss, expected, rtol=tolerance)
    if dtype == torch.float64:
        for mine, other in zip(sae.parameters(), dense.params, strict=True):
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    assert len(dead) > 0 or k == num_latents


@pytest.mark.parametrize("micro_batch", [1, 7, 1000])
def test_micro_batches_give_the_same_steps(micro_batch: int) -> None:
    """Losses, counts and parameters, AuxK included; pieces of any size."""
    whole, pieces = (make_trainer(make_sae(), 60, micro_batch=size) for size in (None, micro_batch))
    for batch in batches(20):
        a, b = whole.step(batch), pieces.step(batch)
        np.testing.assert_allclose(b.loss, a.loss, rtol=1e-9)
        np.testing.assert_allclose(b.aux, a.aux, rtol=1e-9)
        torch.testing.assert_close(b.layer_errors, a.layer_errors, rtol=1e-9, atol=0)
        assert b.layer_rows.tolist() == a.layer_rows.tolist()
        assert (b.num_active, b.num_dead) == (a.num_active, a.num_dead)
    assert a.num_dead > 0
    for mine, other in zip(pieces.sae.parameters(), whole.sae.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
def test_a_run_repeats_bit_for_bit_on_two_threads(mixed: bool) -> None:
    """Weights after steps on both cores, selection and update in many blocks."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    weights = []
    for _ in range(2):
        sae = make_sae(4096, 8, torch.float32, d_in=64)
        trainer = make_trainer(sae, dead_after=300, mixed=mixed)
        for batch in batches(300, 64, steps=3):
            trainer.step(batch)
        weights.append(torch.cat([p.detach().reshape(-1) for p in sae.parameters()]))
    torch.set_num_threads(before)
    assert torch.equal(weights[0], weights[1])


def test_auxk_sees_a_sixteenth_of_the_rows_of_a_large_batch() -> None:
    """Others at every step and seed, and the same ones however the batch is cut."""
    x = torch.randn(20_000, 40, generator=torch.Generator().manual_seed(0)).half()
    chosen = sample(x, len(x), seed=3, step=5)
    assert 0.9 < 16 * chosen.double().mean() < 1.1
    parts = [sample(x[a : a + 777], len(x), 3, 5) for a in range(0, len(x), 777)]
    assert torch.equal(torch.cat(parts), chosen)
    assert torch.equal(sample(x.double(), len(x), 3, 5), chosen)
    for other in (sample(x, len(x), 3, 6), sample(x, len(x), 4, 5)):
        assert 0.5 < 256 * (other & chosen).double().mean() < 1.5


@pytest.mark.parametrize("width", [32, 33])
def test_every_row_is_in_the_sample_equally_often(width: int) -> None:
    """Rows of zeros, rows that agree in most channels, rows of a ReLU: a sixteenth of the steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.relu(torch.randn(300, width, generator=generator) - 1.6)
    x[:100, ::2] = 0.5
    x[100:130] = 0
    x[:50, 1:] = 0
    x[0, 0] = -x[1, 0]
    steps = 3200
    times = torch.stack([sample(x, 8192, 0, step) for step in range(steps)]).double()
    expected, spread = steps / 16, (steps / 16 * 15 / 16) ** 0.5
    assert ((times.sum(0) - expected).abs() < 5 * spread).all()
    # Rows that differ are chosen together no more often than others.
    together = (times[:, 0] * times[:, 200]).sum() + (times[:, 130] * times[:, 299]).sum()
    assert together < 2 * steps / 256 + 5 * (2 * steps / 256) ** 0.5


def test_auxk_sees_at_least_256_rows() -> None:
    """All of a small batch, a larger share of a middling one."""
    x = torch.randn(2048, 12, generator=torch.Generator().manual_seed(0))
    assert sample(x[:256], 256, 0, 0).all()
    assert 0.8 < sample(x, 2048, 0, 0).sum() / 256 < 1.2


def test_the_sampled_auxk_is_right_in_the_mean() -> None:
    """The mean gradient over many samples is that of all rows, but for chance."""
    sae = make_sae(dtype=torch.float32)
    objective = Objective(sae, VARIANCES, "standardized")
    dead = torch.arange(0, 64, 3)
    batch = next(batches(8192, steps=1))

    def gradient(step: int) -> torch.Tensor:
        sae.zero_grad()
        piece = objective.accumulate(batch.x, batch.layer, 8192, step)
        assert piece.residual is not None
        assert sae.W_enc.grad is not None
        before = sae.W_enc.grad.clone()
        objective.accumulate_auxiliary([piece.residual], dead, lambda total: total)
        return sae.W_enc.grad - before

    samples = torch.stack([gradient(step) for step in range(50)]).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auxiliary, "SAMPLE_SHARE", 1.0)
        whole = gradient(0).double()
    error = (samples.mean(0) - whole).norm()
    assert error < 0.1 * whole.norm()
    assert error < 0.2 * (samples[0] - whole).norm()
