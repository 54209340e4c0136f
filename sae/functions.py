"""The two sparse steps of a TopK SAE with their gradients, which touch the selected latents alone.

Dense autograd would make four more products as large as the encoder's. Both functions take the
support as given: selection has no gradient.

Shape suffixes: B rows, D channels, N latents, K selected latents.
"""

from collections.abc import Callable
from typing import Any

import torch

from mlsae.sae.sparse import Support


class _Preactivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u_BD: torch.Tensor,
        W_enc_ND: torch.Tensor,
        b_D: torch.Tensor,
        values_BK: torch.Tensor,
        support: Support,
    ) -> torch.Tensor:
        ctx.save_for_backward(u_BD, W_enc_ND, b_D)
        ctx.support = support
        return values_BK.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_BK,) = grads
        u_BD, W_enc_ND, b_D = ctx.saved_tensors
        support: Support = ctx.support
        need_u, need_W, need_b = ctx.needs_input_grad[:3]
        grad_u = support.product(grad_BK, W_enc_ND) if need_u else None
        grad_W = support.transpose_product(grad_BK, u_BD - b_D) if need_W else None
        grad_b = None
        if need_b:
            # Summed over rows first: one vector through W_enc instead of a bag for each row.
            ones_B1 = u_BD.new_ones(u_BD.shape[0], 1)
            grad_b = -(support.transpose_product(grad_BK, ones_B1)[:, 0] @ W_enc_ND)
        return grad_u, grad_W, grad_b, None, None


class _Bag(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values_BK: torch.Tensor, W_dec_ND: torch.Tensor, support: Support
    ) -> torch.Tensor:
        ctx.save_for_backward(values_BK, W_dec_ND)
        ctx.support = support
        return support.product(values_BK, W_dec_ND)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_BD = grads[0].contiguous()
        values_BK, W_dec_ND = ctx.saved_tensors
        support: Support = ctx.support
        need_values, need_W = ctx.needs_input_grad[:2]
        grad_values = support.sampled_product(grad_BD, W_dec_ND) if need_values else None
        grad_W = support.transpose_product(values_BK, grad_BD) if need_W else None
        return grad_values, grad_W, None


def preactivations(
    u_BD: torch.Tensor,
    W_enc_ND: torch.Tensor,
    b_D: torch.Tensor,
    values_BK: torch.Tensor,
    support: Support,
) -> torch.Tensor:
    """W_enc (u − b) at the support, (B, K), with gradients for u, W_enc and b.

    Args:
        u_BD: (B, D) standardised rows.
        W_enc_ND: (N, D) encoder directions.
        b_D: (D,) the bias that is subtracted.
        values_BK: (B, K) the pre-activations themselves, which selection has computed already.
        support: their places.
    """
    apply: Callable[..., torch.Tensor] = _Preactivations.apply  # torch leaves it untyped
    return apply(u_BD, W_enc_ND, b_D, values_BK, support)


def bag(values_BK: torch.Tensor, W_dec_ND: torch.Tensor, support: Support) -> torch.Tensor:
    """Each row's weighted sum of its latents' decoder rows, (B, D), with gradients for both."""
    apply: Callable[..., torch.Tensor] = _Bag.apply  # torch leaves it untyped
    return apply(values_BK, W_dec_ND, support)
