"""Adam for an SAE, with clipped gradients, and unit rows and bounds where they are asked for.

Adam: Kingma and Ba (2015), arXiv 1412.6980, by torch's own fused kernel.
"""

from collections.abc import Iterator
from typing import Any

import torch

from mlsae.sae import SAE

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 6.25e-10
_BLOCK_ELEMENTS = 1 << 17
"""Weights of a matrix that are updated at once on a CPU: with their gradient and moments 2 MiB in
float32, so that the three passes over them stay in the cache of a core."""


class Optimizer:
    """Adam, after gradients that are too long together were made shorter.

    Parameters with unit rows lose the part of their gradient along each row first, since it would
    change lengths alone, and have unit rows again afterwards. Clipping: Pascanu et al. (2013),
    arXiv 1211.5063.

    Args:
        sae: SAE whose parameters are trained; they must not move to another device any more.
        max_norm: largest L2 norm of all gradients together, summed over ranks; None for any.
    """

    def __init__(self, sae: SAE, max_norm: float | None = None) -> None:
        self._max_norm = max_norm
        kinds = sae.architecture.parameters(sae.config)
        self._parameters = [(k, sae.get_parameter(k.name)) for k in kinds if k.trained]
        self.state: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {
            parameter: {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
            for _, parameter in self._parameters
        }
        """Steps done and moments of each parameter, named as by `torch.optim.Adam`."""

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the parameters by their `.grad`, with learning rate `lr`.

        A `.grad` is left as it was used: clipped, and without its part along unit rows.
        """
        if self._max_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in self._parameters], self._max_norm)
        for kind, parameter in self._parameters:
            self.state[parameter]["step"] += 1
            for rows in _blocks(parameter):
                if not kind.unit_rows:
                    self._adam(parameter, rows, lr)
                    if kind.least is not None:
                        parameter[rows].clamp_(min=kind.least)
                    continue
                assert parameter.grad is not None
                W, grad = parameter[rows], parameter.grad[rows]
                remove_along(W, grad)
                self._adam(parameter, rows, lr)
                W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True))

    @torch.no_grad()
    def forget(self, latents: torch.Tensor) -> None:
        """Set the moments of these latents' weights to 0; other moments and the steps done stay."""
        for kind, parameter in self._parameters:
            if kind.by_latent:
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.state[parameter][moment][latents] = 0

    def _adam(self, parameter: torch.nn.Parameter, rows: slice, lr: float) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        fused: Any = torch._fused_adam_  # Kernel of torch.optim.Adam(fused=True).
        fused(
            [parameter.detach()[rows]],
            [parameter.grad[rows]],
            [state["exp_avg"][rows]],
            [state["exp_avg_sq"][rows]],
            [],
            [state["step"]],
            lr=lr,
            beta1=ADAM_BETAS[0],
            beta2=ADAM_BETAS[1],
            eps=ADAM_EPS,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
        )


def remove_along(W: torch.Tensor, grad: torch.Tensor) -> None:
    """Take from each row of a gradient its part along the row of W, which has unit length."""
    grad.addcmul_(W, (grad * W).sum(dim=1, keepdim=True), value=-1)


def _blocks(parameter: torch.Tensor) -> Iterator[slice]:
    """Rows that are updated at once: a few of a matrix on a CPU, else all."""
    if parameter.ndim == 1 or parameter.device.type != "cpu":
        yield slice(None)
        return
    size = max(1, _BLOCK_ELEMENTS // parameter.shape[1])
    for start in range(0, len(parameter), size):
        yield slice(start, start + size)
