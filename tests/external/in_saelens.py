"""Run by SAELens's interpreter: `forward SAE X OUT`, `make KIND SAE X OUT` or `twice SAE X`."""

import sys

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

D, N, K = 24, 96, 6


def forward(directory, x, out):
    sae = SAE.load_from_disk(directory).to(torch.float64)
    np.save(out, sae(torch.from_numpy(np.load(x))).detach().numpy())
    print(sae.cfg.metadata.hook_name)


def twice(directory, x):
    sae = SAE.load_from_disk(directory).to(torch.float64)
    f = sae.encode(torch.from_numpy(np.load(x)))
    sae.decode(f)
    try:
        sae.decode(f)
    except AttributeError:
        print("AttributeError")


def make(kind, directory, x, out):
    common = {"d_in": D, "d_sae": N, "k": K}
    if kind in ("trained", "checkpoint"):
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**common))
    else:
        sae = TopKSAE(TopKSAEConfig(**common, normalize_activations=kind))
    sae.cfg.metadata.hook_name = "blocks.2.hook_mlp_out"
    sae.cfg.metadata.model_name = "gpt2"
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    (sae.save_inference_model if kind == "trained" else sae.save_model)(directory)
    forward(directory, x, out)


{"forward": forward, "make": make, "twice": twice}[sys.argv[1]](*sys.argv[2:])
