"""Run by sparsify's interpreter: `forward SAE X OUT`, or `make SAE X OUT`, in float64."""

import sys
from pathlib import Path

import numpy as np
import torch
from sparsify import SparseCoder, SparseCoderConfig

D, N, K = 24, 96, 6


def forward(directory, x, out):
    path = Path(directory)
    coder = SparseCoder.load_many(path.parent, local=True)[path.name].double()
    np.save(out, coder(torch.from_numpy(np.load(x))).sae_out.detach().numpy())


def make(directory, x, out):
    torch.manual_seed(0)
    coder = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K))
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_()
    coder.save_to_disk(directory)
    forward(directory, x, out)


{"forward": forward, "make": make}[sys.argv[1]](*sys.argv[2:])
