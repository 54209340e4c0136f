"""State for each layer in formats of single layers, and SAEs of Llamascopium, in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlsae.sae import SAE, Architecture, ReLU, SAEConfig, TopK, load
from mlsae.sae.formats.common import ConversionError
from mlsae.sae.formats.convert import export_sae, import_sae

D, N, K, LAYERS = 12, 48, 5, (0, 3)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
STATE: dict[str, dict[str, Any]] = {
    "scale": {"normalize": "scale", "layers": LAYERS},
    "center": {"normalize": "center", "layers": LAYERS},
    "layer_scale": {"normalize": "none", "layer_scale": "sqrt", "layers": LAYERS},
}


def make(path: Path, architecture: Architecture, **state: Any) -> Path:
    """An SAE with every weight and all state of layers drawn."""
    config = SAEConfig(d_in=D, num_latents=N, architecture=architecture, encoder_bias=True, **state)
    sae = SAE(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*sae.parameters(), sae.layer_shift):
            if tensor is not None:
                tensor.normal_(generator=generator)
        if sae.layer_factor is not None:
            sae.layer_factor.copy_(torch.tensor([0.3, 5.0]))
    sae.save(path, {"site": "resid_post", "layers": list(LAYERS)})
    return path


x = torch.from_numpy(np.random.default_rng(1).normal(1, 3, (50, D)))


def weights(directory: Path, name: str) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(directory / name).items()}


def largest(pre: torch.Tensor) -> torch.Tensor:
    """The K largest above 0 of each row."""
    kept = pre.relu().topk(K, dim=1)
    return torch.zeros_like(pre).scatter(1, kept.indices, kept.values)


def saelens(directory: Path) -> torch.Tensor:
    """û = a W_dec + b_dec, a = TopK((x − b_dec) W_enc + b_enc)."""
    w = weights(directory, "sae_weights.safetensors")
    assert json.loads((directory / "cfg.json").read_text())["normalize_activations"] == "none"
    return largest((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec"]


def sparsify(directory: Path) -> torch.Tensor:
    """û = a W_dec + b_dec, a = TopK((x − b_dec) Eᵀ + e)."""
    w = weights(directory, "sae.safetensors")
    pre = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    return largest(pre) @ w["W_dec"] + w["b_dec"]


def dictionary_learning(directory: Path) -> torch.Tensor:
    """x̂ = a Dᵀ + b_dec, a = TopK((x − b_dec) Eᵀ + e)."""
    w = {n: t.double() for n, t in torch.load(directory / "ae.pt", weights_only=True).items()}
    pre = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    return largest(pre) @ w["decoder.weight"].T + w["b_dec"]


def llamascopium(directory: Path) -> torch.Tensor:
    """x̂ = (a W_D + b_D) / c, a = act(c x W_E + b_E), the activation of a · ‖W_D‖ where so set."""
    w = weights(directory, "sae_weights.safetensors")
    cfg = json.loads((directory / "config.json").read_text())
    assert int(cfg["d_model"] * cfg["expansion_factor"]) == len(w["W_D"])
    factor = 1.0
    if cfg["norm_activation"] == "dataset-wise":
        hook = cfg["hook_point_in"]
        factor = D**0.5 / w[f"dataset_average_activation_norm.{hook}"].item()
    norms = w["W_D"].norm(dim=1) if cfg["sparsity_include_decoder_norm"] else torch.ones(())
    pre = (factor * x @ w["W_E"] + w["b_E"]) * norms
    kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "topk": largest,
        "relu": torch.relu,
        "jumprelu": lambda pre: pre * (pre > w[LOG].exp()),
    }
    assert cfg.get("top_k", K) == K
    return (kinds[cfg["act_fn"]](pre) / norms @ w["W_D"] + w.get("b_D", 0.0)) / factor


LOG = "activation_function.log_jumprelu_threshold"
FORWARD: dict[str, Callable[[Path], torch.Tensor]] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "llamascopium": llamascopium,
}


@pytest.mark.parametrize("state", STATE)
@pytest.mark.parametrize("to", FORWARD)
def test_the_state_of_a_layer_goes_into_its_weights(to: str, state: str, tmp_path: Path) -> None:
    """A folder a layer with weights of its own, which take rows as they are."""
    run = make(tmp_path / "run", TopK(K), **STATE[state])
    written = export_sae(run, to, tmp_path / "out")
    assert len(written) == 2
    for directory, layer in zip(written, LAYERS, strict=True):
        expected = load(run).double()(x, layer).detach()
        torch.testing.assert_close(FORWARD[to](directory), expected, **CLOSE)
        again = import_sae(directory, tmp_path / f"again{layer}", site="resid_post")
        assert again.config.normalize == "none"
        torch.testing.assert_close(again.double()(x).detach(), expected, **CLOSE)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ("scale", r"normalize scale"),
        ("center", r"normalize center"),
        ("layer_scale", "layer scale sqrt"),
    ],
)
def test_a_format_for_all_layers_refuses_it(state: str, named: str, tmp_path: Path) -> None:
    """Nothing approximate is written, and the SAE is there still."""
    run = make(tmp_path / "run", TopK(K), **STATE[state])
    message = rf"the SAE has state for each layer \({named}\), and that format holds one function"
    with pytest.raises(ConversionError, match=message):
        export_sae(run, "mlsae", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_odd_number_of_latents_survives_the_expansion_factor(tmp_path: Path) -> None:
    """Llamascopium computes it back in floating point, and cuts."""
    for num_latents in (43, 49, 58, 79, 95):
        config = SAEConfig(d_in=D, num_latents=num_latents, architecture=ReLU(), normalize="none")
        record = {"site": "resid_post", "layers": [1]}
        SAE(config).save(tmp_path / f"run{num_latents}", record)
        out = tmp_path / f"out{num_latents}"
        (directory,) = export_sae(tmp_path / f"run{num_latents}", "llamascopium", out)
        content = json.loads((directory / "config.json").read_text())
        assert int(D * content["expansion_factor"]) == num_latents


def theirs(path: Path, **changes: Any) -> Path:
    """An SAE as Llamascopium writes it, decoder rows of any length."""
    generator = torch.Generator().manual_seed(5)
    hook = "blocks.7.hook_mlp_out"
    cfg = {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": 4.0,
        "use_decoder_bias": True,
        "act_fn": "topk",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": K,
        "use_triton_kernel": False,
        "sparsity_threshold_for_triton_spmm_kernel": 0.996,
        "jumprelu_threshold_window": 2.0,
        "hook_point_in": hook,
        "hook_point_out": hook,
        "use_glu_encoder": False,
    } | changes
    tensors = {
        "W_E": torch.randn(D, N, generator=generator),
        "b_E": torch.randn(N, generator=generator),
        "W_D": torch.randn(N, D, generator=generator),
        "b_D": torch.randn(D, generator=generator),
        f"dataset_average_activation_norm.{hook}": torch.tensor(9.0),
    }
    if not cfg["use_decoder_bias"]:
        del tensors["b_D"]
    if cfg["act_fn"] == "jumprelu":
        tensors[LOG] = torch.randn(N, generator=generator)
        tensors[LOG][3] = -torch.inf
    path.mkdir()
    (path / "config.json").write_text(json.dumps(cfg))
    save_file(tensors, path / "sae_weights.safetensors")
    return path


@pytest.mark.parametrize("activation", ["topk", "relu"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_activation": "inference"},
        {"sparsity_include_decoder_norm": False},
        {"use_decoder_bias": False},
    ],
)
def test_an_sae_of_llamascopium_is_imported(
    activation: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """In every setting that changes numbers; site and layer from its hook point."""
    directory = theirs(tmp_path / "theirs", act_fn=activation, **changes)
    sae = import_sae(directory, tmp_path / "sae")
    expected = llamascopium(directory)
    torch.testing.assert_close(sae.double()(x).detach(), expected, rtol=1e-4, atol=1e-4)
    record = sae.training_record
    assert (record["site"], record["layers"]) == ("mlp_out", [7])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "batchtopk"}, "its act_fn is 'batchtopk', and understood are .*topk"),
        ({"sae_type": "crosscoder"}, "sae_type is 'crosscoder', and an SAE that is imported has"),
        ({"use_glu_encoder": True}, "use_glu_encoder is True, and an SAE that is imported has"),
        ({"norm_activation": "token-wise"}, "norm_activation is 'token-wise', and an SAE that is"),
        ({"hook_point_out": "blocks.8.hook_mlp_out"}, "hook_point_out is 'blocks.8.hook_mlp_out'"),
        ({"noise": 1}, r"noise \(1\) is no entry that is understood"),
        ({"expansion_factor": 5.0}, r"expected W_E of shape \(12, 60\), got \(12, 48\)"),
        ({"hook_point_in": "a", "hook_point_out": "a"}, "lacks the mean norm by which rows are"),
    ],
)
def test_what_of_llamascopium_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Each setting with which Llamascopium computes otherwise is named."""
    with pytest.raises(ConversionError, match=message):
        import_sae(theirs(tmp_path / "theirs", **changes), tmp_path / "sae")
