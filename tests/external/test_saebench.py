"""SAEBench's own measures, and SAELens's own splicing, on the object that is made for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.sae import SAE, SAEConfig, TopK, load

pytestmark = [
    pytest.mark.external,
    pytest.mark.timeout(3000),  # Environments may have to be installed.
]

D, N, LAYER, TOKENS = 32, 64, 1, 8
CLASSES = ("0", "1", "2", "6", "9")
"""Names of SAEBench for the classes of one of its sets; class i has latent i here."""

Rows = npt.NDArray[np.float32]


def make_sae(path: Path) -> SAE:
    """An SAE whose encoder reads what its decoder writes, of standardised rows."""
    sae = SAE(SAEConfig(d_in=D, num_latents=N, architecture=TopK(4)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        W = torch.randn(N, D, generator=generator)
        W -= W.mean(dim=1, keepdim=True)
        W[: len(CLASSES)] = torch.linalg.qr(W[: len(CLASSES)].T).Q.T
        W /= W.norm(dim=1, keepdim=True)
        sae.W_enc.copy_(W)
        sae.W_dec.copy_(W)
        sae.b.normal_(generator=generator).mul_(0.1)
    sae.save(path, {"site": "resid_post", "layers": [0, LAYER]})
    return load(path)


def texts(sae: SAE, latent: int, number: int, seed: int) -> Rows:
    """Rows (texts, tokens, channels) with one latent, others at random, of any spread and mean."""
    rng = np.random.default_rng(seed)
    W = sae.W_dec.detach().numpy()
    shape = (number, TOKENS, 1)
    others = W[rng.integers(len(CLASSES), N, shape[:2])]
    x = rng.uniform(1, 2, shape) * W[latent] + rng.uniform(0, 1, shape) * others
    x = x * rng.lognormal(0, 1, shape) + rng.normal(size=shape)
    return x.astype(np.float32)


@pytest.fixture
def measured(peer: Callable[..., str], tmp_path: Path) -> tuple[SAE, dict[str, Any], Any]:
    """The SAE, all that SAEBench reported, and arrays of its TPP."""
    sae = make_sae(tmp_path / "sae")
    rows = {
        f"{part}/{name}": texts(sae, i, number, 10 * i + number)
        for part, number in (("train", 40), ("test", 20))
        for i, name in enumerate(CLASSES)
    }
    np.savez(tmp_path / "x.npz", **rows)
    peer("saebench", tmp_path / "sae", tmp_path / "x.npz", tmp_path, LAYER)
    found = json.loads((tmp_path / "found.json").read_text())
    return sae, found | {"rows": rows}, np.load(tmp_path / "effects.npz")


def test_saebench_and_saelens_are_exact_on_it(
    measured: tuple[SAE, dict[str, Any], Any],
) -> None:
    """Probing and TPP find the planted latents; effects and ablations are those by definition."""
    sae, found, arrays = measured
    assert found["probing"]["sae_top_1_test_accuracy"] > 0.97
    assert found["tpp"]["tpp_threshold_1_total_metric"] > 0.3
    # By definition, in float64: f = σz.
    x = arrays["drawn"].astype(np.float64)
    latents = sae.double().encode(torch.from_numpy(x))
    dense = torch.zeros(*x.shape[:-1], N, dtype=torch.float64)
    z = dense.scatter(-1, latents.indices, latents.values).detach().numpy()
    f = z * x.std(axis=-1, ddof=1, keepdims=True)
    W = sae.W_dec.detach().numpy()

    def effects(of: Any) -> Any:
        mean = of.mean(axis=1)
        gap = mean[arrays["labels"] == 1].mean(axis=0) - mean[arrays["labels"] == 0].mean(axis=0)
        return np.maximum(gap, 0) * (W @ arrays["probe"].astype(np.float64))

    np.testing.assert_allclose(arrays["effects"], effects(f), rtol=1e-4, atol=1e-5)
    assert np.abs(effects(z) - effects(f)).max() > 0.1 * np.abs(effects(f)).max()
    # The test texts without three latents, their error kept.
    x = found["rows"][f"test/{CLASSES[0]}"].astype(np.float64)
    latents = sae.encode(torch.from_numpy(x))
    ablated = torch.from_numpy(arrays["ablated"])[latents.indices]
    values = torch.where(ablated, 0, latents.values)
    written = sae.decode(latents) - sae.decode(latents._replace(values=values))
    expected = (x - written.detach().numpy()).mean(axis=1)
    np.testing.assert_allclose(arrays["without"], expected, rtol=1e-4, atol=1e-4)
    # Spliced by SAELens as by hand; with the error kept nothing changes but what is ablated.
    splice = found["splice"]
    for name in ("spliced", "kept", "edited"):
        assert splice[name] < 1e-4, name
    assert splice["changed"] > 1e-2
    assert splice["active"] <= 4
    assert found["weights_finite"]
