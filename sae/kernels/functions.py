"""The two sparse steps of an SAE with their gradients, which touch the latents in use alone.

Dense autograd would make four more products as large as the encoder's. Both functions take the
support as given: selection has no gradient.

Shape suffixes: B rows, D channels, N latents, K selected latents.
"""

from collections.abc import Callable
from typing import Any

import torch

from mlsae.sae.kernels.sparse import Support


class _Preactivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u_BD: torch.Tensor,
        W_enc_ND: torch.Tensor,
        b_D: torch.Tensor,
        b_enc_N: torch.Tensor | None,  # noqa: ARG004
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
        need_u, need_W, need_b, need_b_enc = ctx.needs_input_grad[:4]
        grad_u = support.product(grad_BK, W_enc_ND) if need_u else None
        grad_W = support.transpose_product(grad_BK, u_BD - b_D) if need_W else None
        grad_b = grad_b_enc = None
        if need_b or need_b_enc:
            # Summed over rows first: one vector through W_enc instead of a bag for each row.
            ones_B1 = u_BD.new_ones(u_BD.shape[0], 1)
            summed_N = support.transpose_product(grad_BK, ones_B1)[:, 0]
            grad_b = -(summed_N @ W_enc_ND) if need_b else None
            grad_b_enc = summed_N if need_b_enc else None
        return grad_u, grad_W, grad_b, grad_b_enc, None, None


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
    b_enc_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """W_enc (u − b) + b_enc at the support, (B, K), with gradients for u and all weights.

    Args:
        u_BD: (B, D) standardised rows.
        W_enc_ND: (N, D) encoder directions.
        b_D: (D,) the bias that is subtracted.
        values_BK: (B, K) the pre-activations themselves, which selection has computed already.
        support: places of the pre-activations.
        b_enc_N: (N,) bias of each latent; None for none.
    """
    apply: Callable[..., torch.Tensor] = _Preactivations.apply  # torch leaves it untyped
    return apply(u_BD, W_enc_ND, b_D, b_enc_N, values_BK, support)


def bag(values_BK: torch.Tensor, W_dec_ND: torch.Tensor, support: Support) -> torch.Tensor:
    """Each row's weighted sum of its latents' decoder rows, (B, D), with gradients for both."""
    apply: Callable[..., torch.Tensor] = _Bag.apply  # torch leaves it untyped
    return apply(values_BK, W_dec_ND, support)
