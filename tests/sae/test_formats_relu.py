"""ReLU SAEs in the formats of other tools."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mlsae.sae import SAE, ReLU, SAEConfig, load
from mlsae.sae.formats.common import ConversionError
from mlsae.sae.formats.convert import export_sae, import_sae

D, N = 12, 48


def make(path: Path, config: SAEConfig) -> Path:
    sae = SAE(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
    sae.save(path, {"site": "resid_post", "layers": [0, 3]})
    return path


def relu(normalize: str, *, bias: bool) -> SAEConfig:
    return SAEConfig(
        d_in=D, num_latents=N, architecture=ReLU(), normalize=normalize, encoder_bias=bias
    )


def saelens(directory: Path, x: torch.Tensor) -> torch.Tensor:
    """The `standard` SAE: a = ((u − b_dec) W_enc + b_enc)⁺, û = a W_dec + b_dec."""
    w = {name: t.double() for name, t in load_file(directory / "sae_weights.safetensors").items()}
    cfg = json.loads((directory / "cfg.json").read_text())
    assert cfg["architecture"] == "standard"
    assert "k" not in cfg
    mean, std = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    u = x
    if cfg["normalize_activations"] == "layer_norm":
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        u = (x - mean) / (std + 1e-5)
    acts = ((u - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    return (acts @ w["W_dec"] + w["b_dec"]) * std + mean


def dictionary_learning(directory: Path, x: torch.Tensor) -> torch.Tensor:
    """AutoEncoder: f = (E (x − bias) + e)⁺, x̂ = D f + bias."""
    w = {n: t.double() for n, t in torch.load(directory / "ae.pt", weights_only=True).items()}
    cfg = json.loads((directory / "config.json").read_text())
    assert cfg["trainer"]["dict_class"] == "AutoEncoder"
    assert w.keys() == {"encoder.weight", "encoder.bias", "decoder.weight", "bias"}
    acts = ((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    return acts @ w["decoder.weight"].T + w["bias"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("to", "forward", "normalize"),
    [
        ("saelens", saelens, "standardize"),
        ("saelens", saelens, "none"),
        ("dictionary-learning", dictionary_learning, "none"),
    ],
)
def test_a_relu_sae_goes_there_and_back(
    to: str,
    forward: Callable[[Path, torch.Tensor], torch.Tensor],
    normalize: str,
    bias: bool,
    tmp_path: Path,
) -> None:
    """Equal reconstructions in float64; imported again it is the same SAE to the bit."""
    run = make(tmp_path / "run", relu(normalize, bias=bias))
    sae = load(run)
    x = torch.from_numpy(np.random.default_rng(1).normal(3, 20, (50, D)))
    for place, directory in enumerate(export_sae(run, to, tmp_path / "out")):
        expected = load(run).double()(x).detach()
        torch.testing.assert_close(forward(directory, x), expected, rtol=1e-10, atol=1e-10)
        again = import_sae(directory, tmp_path / f"again{place}")
        assert again.config == sae.config
        for name, tensor in sae.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("to", ["sparsify", "mlsae"])
def test_formats_of_topk_refuse_relu(to: str, tmp_path: Path) -> None:
    """They have no place for it."""
    run = make(tmp_path / "run", relu("none", bias=False))
    message = f"to {to}: the SAE has architecture relu, and that format can hold only topk"
    with pytest.raises(ConversionError, match=message):
        export_sae(run, to, tmp_path / "out")
