"""Gradients that are too long are made shorter before Adam sees them.

Source: Pascanu et al. (2013), arXiv 1211.5063.
"""

import torch

from mlsae.sae import SAE
from mlsae.train.step.optimizer import Optimizer


class ClippedOptimizer(Optimizer):
    """Scales all gradients together so that their L2 norm is at most a given one.

    Args:
        sae: as for `Optimizer`.
        max_norm: the largest norm, of the sum over ranks.
    """

    def __init__(self, sae: SAE, max_norm: float) -> None:
        super().__init__(sae)
        self._max_norm = max_norm
        self._parameters = list(sae.parameters())

    def step(self, lr: float) -> None:
        """As of `Optimizer`, with clipped gradients."""
        torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        super().step(lr)
