"""The step of the preset `paper` against the published code itself."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mlsae.sae import SAE, SAEConfig, TopK, load
from mlsae.sae.formats.convert import export_sae
from mlsae.train.published.step import PaperTrainer

pytestmark = [
    pytest.mark.external,
    pytest.mark.timeout(3000),  # Environments may have to be installed.
    pytest.mark.skipif(
        "MLSAE_PUBLISHED" not in os.environ,
        reason="set MLSAE_PUBLISHED to a checkout of github.com/tim-lawson/mlsae",
    ),
]

D, N, K, LAYERS, TOKENS, STEPS, MICRO = 24, 192, 4, 3, 64, 50, 4


def test_the_loss_curve_is_the_published_one(peer: Callable[..., str], tmp_path: Path) -> None:
    """Float32, 50 steps of 4 micro-batches, from equal weights; latents die on the way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, MICRO, LAYERS, TOKENS, D, generator=generator)
    x = x * torch.tensor([1.0, 3.0, 10.0])[:, None, None] + torch.linspace(-1, 1, D)
    x[:, :, :, ::16] = 0  # Special tokens.
    np.save(tmp_path / "x.npy", x.numpy())
    sae = SAE(SAEConfig(d_in=D, num_latents=N, architecture=TopK(K)), generator)
    sae.save(tmp_path / "sae", {"site": "resid_post", "layers": [0, 1, 2]})
    (exported,) = export_sae(tmp_path / "sae", "mlsae", tmp_path / "out")
    source, losses = os.environ["MLSAE_PUBLISHED"], tmp_path / "losses.npy"
    said = peer("published", "train", exported, tmp_path / "x.npy", losses, source)
    dead = float(said.split()[-1])
    trainer = PaperTrainer(load(tmp_path / "sae").train(), lr=1e-3, k_aux=8, dead_after=3)
    found = [trainer.step(step, MICRO).loss for step in x]
    np.testing.assert_allclose(found, np.load(losses), rtol=1e-4)
    assert trainer.num_dead == round(dead * N) > 0
