"""Run beside the published source: `forward SAE X OUT SOURCE`, `make …` in float64, `train …`."""

import sys
import types
from pathlib import Path

import numpy as np
import torch

D, N, K = 24, 96, 6


def module(source):
    """The published class, without the modules that its packages import to train."""
    for name in ("mlsae", "mlsae.model", "mlsae.metrics"):
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
    sae = module(source)(D, N, K, dead_steps_threshold=36, auxk=8)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    sae.save_pretrained(directory)
    forward(directory, x, out, source)


def train(directory, batches, out, source):
    """Write the loss curve on micro-batches (steps, micro-batches, layers, tokens, channels)."""
    MLSAE = module(source)
    from mlsae.metrics.auxiliary_loss import AuxiliaryLoss
    from mlsae.metrics.mse_loss import MSELoss
    from mlsae.model.autoencoder import unit_norm_decoder, unit_norm_decoder_gradient
    from mlsae.model.geom_median import geometric_median

    batches = torch.from_numpy(np.load(batches))
    sae = MLSAE.from_pretrained(directory, dead_steps_threshold=3, auxk=8)
    main, auxiliary = MSELoss(batches.shape[2]), AuxiliaryLoss(1 / 32)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-3, eps=6.25e-10)
    sae.pre_encoder_bias.data = geometric_median(batches[0, 0][:, None])
    losses = []
    for step in batches:
        total = 0.0
        for inputs in step[:, :, None]:
            _, recons, _, auxk_recons, dead = sae(inputs)
            loss = main(inputs=inputs, recons=recons) + auxiliary(
                inputs=inputs, recons=recons, auxk_recons=auxk_recons
            )
            (loss / len(step)).backward()
            unit_norm_decoder(sae.decoder)
            unit_norm_decoder_gradient(sae.decoder)
            total += loss.item() / len(step)
        adam.step()
        adam.zero_grad()
        losses.append(total)
    np.save(out, losses)
    print(float(dead))


{"forward": forward, "make": make, "train": train}[sys.argv[1]](*sys.argv[2:])
