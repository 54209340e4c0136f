"""Run beside the published module's source: `forward SAE X OUT SOURCE`, or `make …`, in float64."""

import sys
import types
from pathlib import Path

import numpy as np
import torch

D, N, K = 24, 96, 6


def module(source):
    """Its class, without what its packages import to train."""
    for name in ("mlsae", "mlsae.model"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(source, *name.split(".")))]
        sys.modules[name] = package
    from mlsae.model.autoencoder import MLSAE

    return MLSAE


def forward(directory, x, out, source):
    sae = module(source).from_pretrained(directory).double()
    np.save(out, sae(torch.from_numpy(np.load(x))[None, None]).recons[0, 0].detach().numpy())


def make(directory, x, out, source):
    torch.manual_seed(0)
    sae = module(source)(D, N, K, dead_steps_threshold=76, auxk=8)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    sae.save_pretrained(directory)
    forward(directory, x, out, source)


{"forward": forward, "make": make}[sys.argv[1]](*sys.argv[2:])
