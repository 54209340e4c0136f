"""Run by dictionary_learning's interpreter: `forward SAE X OUT` or `make SAE X OUT`, in float64."""

import sys
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

D, N, K = 24, 96, 6


def forward(directory, x, out):
    dictionary, _ = load_dictionary(str(directory), "cpu")
    np.save(out, dictionary.double()(torch.from_numpy(np.load(x))).detach().numpy())


def make(directory, x, out):
    torch.manual_seed(0)
    trainer = {
        "trainer": TopKTrainer,
        "dict_class": AutoEncoderTopK,
        "steps": 20,
        "activation_dim": D,
        "dict_size": N,
        "k": K,
        "lr": 1e-2,
        "warmup_steps": 1,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_3",
        "device": "cpu",
    }
    batches = (torch.randn(64, D) for _ in range(30))
    trainSAE(batches, [trainer], steps=20, save_dir=str(Path(directory).parent), device="cpu")
    forward(directory, x, out)


{"forward": forward, "make": make}[sys.argv[1]](*sys.argv[2:])
