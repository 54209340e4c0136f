"""SAEs of this package with random weights, and SAEs as other tools write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mlsae.sae import SAE, SAEConfig, TopK

D, N, K = 12, 48, 5


def make(path: Path, normalize: str, *, bias: bool, layers: tuple[int, ...] = (0, 3)) -> Path:
    """An SAE with every weight random, decoder norms included."""
    config = SAEConfig(
        d_in=D, num_latents=N, architecture=TopK(K), normalize=normalize, encoder_bias=bias
    )
    sae = SAE(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
    sae.save(path, {"site": "resid_post", "layers": list(layers)})
    return path


def foreign(path: Path, form: str, *, of: torch.dtype = torch.float32, **changes: Any) -> Path:
    """An SAE as its own tool writes it, with an encoder bias and decoder rows of any length."""
    generator = torch.Generator().manual_seed(5)
    num_latents = D * changes.get("expansion_factor", 4)
    E, W = torch.randn(2, num_latents, D, generator=generator)
    e, b = torch.randn(num_latents, generator=generator), torch.randn(D, generator=generator)
    tensors, cfg = {
        "saelens": (
            {"W_enc": E.T, "b_enc": e, "W_dec": W, "b_dec": b},
            {
                "d_in": D,
                "d_sae": num_latents,
                "dtype": "float32",
                "device": "cpu",
                "apply_b_dec_to_input": True,
                "normalize_activations": "none",
                "reshape_activations": "none",
                "metadata": {
                    "sae_lens_version": "6.18.0",
                    "sae_lens_training_version": "6.18.0",
                    "model_name": "gpt2",
                    "hook_name": "blocks.7.hook_mlp_out",
                },
                "k": K,
                "rescale_acts_by_decoder_norm": False,
                "architecture": "topk",
            },
        ),
        "sparsify": (
            {"encoder.weight": E, "encoder.bias": e, "W_dec": W, "b_dec": b},
            {
                "activation": "topk",
                "expansion_factor": 32,
                "normalize_decoder": True,
                "num_latents": num_latents,
                "k": K,
                "multi_topk": True,
                "skip_connection": False,
                "transcode": False,
                "d_in": D,
            },
        ),
        "dictionary-learning": (
            {
                "encoder.weight": E,
                "encoder.bias": e,
                "decoder.weight": W.T,
                "b_dec": b,
                "k": torch.tensor(K, dtype=torch.int32),
                "threshold": torch.tensor(0.3),
            },
            {
                "trainer": {
                    "trainer_class": "TopKTrainer",
                    "dict_class": "AutoEncoderTopK",
                    "k": K,
                    "layer": 4,
                    "lm_name": "google/gemma-2-2b",
                    "submodule_name": "resid_post_layer_4",
                    "lr": float("nan"),
                },
                "buffer": {"ctx_len": 128},
            },
        ),
        "mlsae": (
            {
                "encoder.weight": E,
                "decoder.weight": W.T,
                "pre_encoder_bias": b,
                "last_nonzero": torch.zeros(num_latents, dtype=torch.int64),
            },
            {"n_inputs": D, "n_latents": num_latents, "k": K, "standardize": True},
        ),
    }[form]
    files = {
        "saelens": ("cfg.json", "sae_weights.safetensors"),
        "sparsify": ("cfg.json", "sae.safetensors"),
        "dictionary-learning": ("config.json", "ae.pt"),
        "mlsae": ("config.json", "model.safetensors"),
    }[form]
    path.mkdir(parents=True)
    cfg |= changes
    (path / files[0]).write_text(json.dumps(cfg))
    saved = {n: (t.to(of) if t.is_floating_point() else t).contiguous() for n, t in tensors.items()}
    if files[1] == "ae.pt":
        torch.save(saved, path / files[1])
    else:
        save_file(saved, path / files[1])
    return path


@pytest.fixture
def make_sae() -> Callable[..., Path]:
    """`make`, for tests, which cannot import this file."""
    return make


@pytest.fixture
def make_foreign() -> Callable[..., Path]:
    """`foreign`, for tests."""
    return foreign
