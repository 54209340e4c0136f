"""Adam for an SAE, whose decoder rows keep unit length where the architecture has them so.

Adam: Kingma and Ba (2015), arXiv 1412.6980, by torch's own fused kernel.
"""

from typing import Any

import torch

from mlsae.sae import SAE

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 6.25e-10
_BLOCK_ELEMENTS = 1 << 17
"""Weights of a matrix that are updated at once on a CPU: with their gradient and moments 2 MiB in
float32, so that the three passes over them stay in the cache of a core."""


class Optimizer:
    """Removes the decoder gradient along its rows, runs Adam, and makes decoder rows unit again.

    Decoder rows of any length are left to Adam alone.

    Args:
        sae: its parameters are trained; they must not move to another device any more.
    """

    def __init__(self, sae: SAE) -> None:
        self._sae = sae
        self.state: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {
            parameter: {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
            for parameter in sae.parameters()
        }
        """Steps done and moments of each parameter, named as by `torch.optim.Adam`."""

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the parameters by their `.grad`, with learning rate `lr`.

        Only the part of the decoder's gradient across its rows is used: the rest would change
        their lengths alone. `W_dec.grad` is left without it. Not so where lengths are free.
        """
        sae = self._sae
        for state in self.state.values():
            state["step"] += 1
        num_latents, width = sae.W_enc.shape
        block = num_latents
        if sae.W_enc.device.type == "cpu":
            block = max(1, _BLOCK_ELEMENTS // width)
        self._adam(sae.b, slice(None), lr)
        if sae.b_enc is not None:
            self._adam(sae.b_enc, slice(None), lr)
        for start in range(0, num_latents, block):
            rows = slice(start, start + block)
            self._adam(sae.W_enc, rows, lr)
            if not sae.architecture.unit_decoder:
                self._adam(sae.W_dec, rows, lr)
                continue
            assert sae.W_dec.grad is not None
            W, grad = sae.W_dec[rows], sae.W_dec.grad[rows]
            grad.addcmul_(W, (grad * W).sum(dim=1, keepdim=True), value=-1)
            self._adam(sae.W_dec, rows, lr)
            W.div_(torch.linalg.vector_norm(W, dim=1, keepdim=True))

    @torch.no_grad()
    def forget(self, latents: torch.Tensor) -> None:
        """Set the moments of these latents' weights to 0; b's and the steps done stay."""
        sae = self._sae
        for parameter in (sae.W_enc, sae.W_dec, sae.b_enc):
            if parameter is not None:
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.state[parameter][moment][latents] = 0

    def _adam(self, parameter: torch.nn.Parameter, rows: slice, lr: float) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        fused: Any = torch._fused_adam_  # Of the kernels that torch.optim.Adam has, the one.
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
