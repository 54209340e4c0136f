"""The step of the published SAEs against its formulas, dense and in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.sae import SAE, SAEConfig, TopK, load
from mlsae.store import open_store
from mlsae.store.read.split import validation_of
from mlsae.train import TrainConfig, run
from mlsae.train.pipeline import UselessSAEsError
from mlsae.train.published.step import PaperTrainer, geometric_median
from mlsae.train.step.trainer import DivergedError

D, N, K, K_AUX, LAYERS, TOKENS, MICRO, DEAD_AFTER = 12, 64, 4, 8, 3, 20, 3, 3


def micro_batches(steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (steps, MICRO, LAYERS, TOKENS, D)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)[:, None, None] + 1
    x[:, :, :, ::7] = 0
    return x


class Dense:
    """The published module, line by line."""

    def __init__(self, sae: SAE, b: torch.Tensor) -> None:
        start = (sae.W_enc, sae.W_dec, b)
        self.params = [p.detach().clone().requires_grad_() for p in start]
        self.unused = torch.zeros(N, dtype=torch.int64)
        self.adam = torch.optim.Adam(self.params, lr=1e-3, eps=6.25e-10)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        W_enc, W_dec, b = self.params
        m, s = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        pre = ((x - m) / (s + 1e-5) - b) @ W_enc.T
        values, at = pre.topk(K, dim=-1)
        z = torch.zeros_like(pre).scatter(-1, at, values).relu()
        self.unused[at[values > 1e-3]] = 0
        self.unused += 1
        masked = pre * (self.unused >= DEAD_AFTER)
        values, at = masked.topk(K_AUX, dim=-1)
        z_aux = torch.zeros_like(pre).scatter(-1, at, values).relu()
        e = x - ((z @ W_dec + b) * s + m)
        main = (e.square().mean((1, 2)) / x.var((1, 2))).mean()
        left = (e - (z_aux @ W_dec + b)).square().mean()
        return main + left / (e - e.mean(-1, keepdim=True)).square().mean() / 32

    def step(self, batch: torch.Tensor) -> float:
        self.adam.zero_grad()
        total = 0.0
        W_dec = self.params[1]
        for x in batch:
            loss = self.loss(x)
            (loss / MICRO).backward()
            total += loss.item() / MICRO
            with torch.no_grad():
                W_dec /= W_dec.norm(dim=1, keepdim=True)
                assert W_dec.grad is not None
                W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        self.adam.step()
        return total


def test_fifty_steps_equal_dense_autograd() -> None:
    """Losses and parameters to 1e-9; no latent is dead at first, then some are."""
    config = SAEConfig(d_in=D, num_latents=N, architecture=TopK(K))
    sae = SAE(config, torch.Generator().manual_seed(0)).double()
    trainer = PaperTrainer(sae, lr=1e-3, k_aux=K_AUX, dead_after=DEAD_AFTER)
    x = micro_batches(50)
    dense = Dense(sae, geometric_median(x[0, 0].flatten(0, 1)))
    num_dead = []
    for step in x:
        result = trainer.step(step, MICRO)
        np.testing.assert_allclose(result.loss, dense.step(step), rtol=1e-9)
        num_dead.append(trainer.num_dead)
        assert 0 < result.l0 <= K
    assert max(num_dead) > 0
    for mine, other in zip(sae.parameters(), dense.params, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    """Points around it have a larger sum; so too where the median is a point itself."""
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(101, 3, generator=generator, dtype=torch.float64) ** 3
    median = geometric_median(points, 1000, 1e-12)
    sums = [(points - median - step).norm(dim=1).sum() for step in 1e-3 * torch.eye(3)]
    assert all((points - median).norm(dim=1).sum() < other for other in sums)
    cross = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert geometric_median(cross).tolist() == [0, 0]
    assert geometric_median(torch.ones(4, 2)).tolist() == [1, 1]


def test_a_loss_that_is_no_number_stops_before_the_weights_change() -> None:
    """As of every trainer."""
    sae = SAE(SAEConfig(d_in=D, num_latents=N, architecture=TopK(K))).double()
    trainer, x = PaperTrainer(sae), micro_batches(1)[0]
    before = sae.W_enc.detach().clone()
    x[1, 0, 3, 4] = torch.nan
    with pytest.raises(DivergedError, match=r"the loss is nan at step 0"):
        trainer.step(x, MICRO)
    assert torch.equal(sae.W_enc, before)


def config(sample: Any, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "num_latents": 64,
        "k": 4,
        "batch_size": 400,
        "lr": 3e-3,
        "epochs": 2,
        "validation_fraction": 0.1,
        "device": "cpu",
        "preset": "paper",
    }
    return TrainConfig(cache=sample.path, out=out, **settings | changes)


def test_a_run_is_of_whole_sequences_in_the_order_of_the_text(sample: Any, tmp_path: Path) -> None:
    """Special tokens are 0 there and not in the store; the losses are the trainer's."""
    out = tmp_path / "sae"
    # A few steps make it no better than the mean, which the preset says as any run does.
    with pytest.raises(UselessSAEsError):
        run(config(sample, out))
    store, sae = open_store(sample.path), load(out)
    length, layers = store.context_length, store.layers
    before = store.read("resid_post", 1)
    split = sae.training_record["validation"]
    held_out = validation_of(store, split["fraction"], split["seed"])
    order = [s for s in range(store.num_sequences) if s not in held_out]
    count = 400 // (length * len(layers))
    assert count >= 2
    fresh = SAE(sae.config, torch.Generator().manual_seed(0))
    trainer = PaperTrainer(fresh, 3e-3, dead_after=round(155_648 / length))
    losses = []
    for _ in range(2):
        for first in range(0, len(order) - count + 1, count):
            batch = []
            for s in order[first : first + count]:
                span = (s * length, (s + 1) * length)
                x = np.stack([store.read("resid_post", n, *span) for n in layers])
                x[:, store.row_flags(*span) != 0] = 0
                batch.append(torch.from_numpy(x))
            losses.append(trainer.step(batch, count).loss)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-5)
    torch.testing.assert_close(sae.W_enc, fresh.W_enc)
    assert (store.read("resid_post", 1) == before).all()
    assert sae.training_record["settings"]["preset"] == "paper"
    assert "\npreset: paper\n" in (out / "run.yaml").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "essay"}, "--preset must be paper, got 'essay'"),
        ({"normalize": "center"}, "--preset paper has standardize or none for --normalize, got"),
        ({"layer_weights": (1.0, 2.0)}, "--preset paper has nothing for --layer-weights"),
        ({"resume": True}, "--preset paper keeps no checkpoints: leave --resume out"),
        ({"lr": 1e38}, "--preset paper takes a --lr of at most 3.4e+37, got 1e+38"),
    ],
)
def test_what_the_preset_has_not(
    changes: dict[str, Any], message: str, sample: Any, tmp_path: Path
) -> None:
    """The flag, and what would do."""
    with pytest.raises(InputError) as caught:
        run(config(sample, tmp_path / "out", **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
