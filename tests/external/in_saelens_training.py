"""Run by SAELens's interpreter: `X OUT KIND L0 NUM_LATENTS STEPS BATCH` trains SAEs on the rows X.

Several settings, each saved for inference in a folder of OUT; the caller takes the best.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
THRESHOLDS = ((0.01, 0.05), (0.1, 0.5))
"""SAELens's own first threshold and bandwidth, and wider ones, for rows of norm √d."""


def batches(x, size):
    generator = torch.Generator().manual_seed(0)
    while True:
        for part in torch.randperm(len(x), generator=generator).split(size):
            if len(part) == size:
                yield x[part]


def candidates(kind, width, num_latents, l0):
    """(name, learning rate, SAE) of each setting."""
    size = {"d_in": width, "d_sae": num_latents}
    for lr in LEARNING_RATES:
        if kind == "batchtopk":
            yield f"{lr}", lr, BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, k=l0))
            continue
        for threshold, bandwidth in THRESHOLDS:
            config = JumpReLUTrainingSAEConfig(
                **size,
                jumprelu_init_threshold=threshold,
                jumprelu_bandwidth=bandwidth,
                jumprelu_sparsity_loss_mode="quadratic",
                target_l0=l0,
            )
            yield f"{lr}-{bandwidth}", lr, JumpReLUTrainingSAE(config)


def main(path, out, kind, l0, num_latents, steps, batch):
    x, steps, batch = torch.from_numpy(np.load(path)), int(steps), int(batch)
    for name, lr, sae in candidates(kind, x.shape[1], int(num_latents), float(l0)):
        torch.manual_seed(0)
        sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
        config = SAETrainerConfig(
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            lr=lr,
            lr_end=0.0,
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 5,
            logger=LoggingConfig(log_to_wandb=False),
        )
        SAETrainer(config, sae, batches(x, batch)).fit()
        sae.save_inference_model(Path(out) / name)


main(*sys.argv[1:])
