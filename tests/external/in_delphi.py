"""Run by Delphi's interpreter: `read CACHE OUT`, or `records CACHE OUT CONTEXT`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentDataset
from safetensors.numpy import save_file


def dataset(cache, **settings):
    constructor = ConstructorConfig(min_examples=1, n_non_activating=2, **settings)
    sampler = SamplerConfig(n_examples_train=4, n_examples_test=4, n_quantiles=2)
    return LatentDataset(cache, sampler, constructor)


def read(cache, out):
    """Events by module, as its buffers give them, all and of chosen latents; and its tokens."""
    found = {}
    whole = dataset(cache)
    chosen = {module: torch.tensor([1, 7, 40]) for module in whole.modules}
    some = LatentDataset(cache, whole.sampler_cfg, whole.constructor_cfg, latents=chosen)
    for name, data in (("all", whole), ("some", some)):
        found[f"{name}/tokens"] = data.tokens.numpy()
        for module in data.modules:
            parts = [
                (location.numpy(), activation.numpy())
                for buffer in data.buffers
                if buffer.module_path == module
                for _, location, activation in zip(*buffer.load_data_per_latent(), strict=True)
            ]
            locations, activations = zip(*parts, strict=True)
            found[f"{name}/{module}/locations"] = np.concatenate(locations)
            found[f"{name}/{module}/activations"] = np.concatenate(activations)
    save_file(found, out)


def records(cache, out, context):
    """Write what an explainer gets for each latent: windows of tokens and values, frequencies."""
    rows = [
        {
            "latent": str(record.latent),
            "frequency": record.per_token_frequency,
            "tokens": [example.tokens.tolist() for example in record.examples],
            "values": [example.activations.tolist() for example in record.examples],
            "text": ["".join(example.str_tokens) for example in record.train],
            "inactive": [example.tokens.tolist() for example in record.not_active],
        }
        for record in dataset(cache, example_ctx_len=int(context))
    ]
    Path(out).write_text(json.dumps(rows))


{"read": read, "records": records}[sys.argv[1]](*sys.argv[2:])
