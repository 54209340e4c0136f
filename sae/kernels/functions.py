"""The sparse steps of an SAE with their derivatives, which touch the latents in use alone.

Dense autograd would make four more products as large as the encoder's. Three products are the
derivatives of each other, so that they can be differentiated any number of times: Z W and Zᵀ X for
the sparse Z of some values, and X Wᵀ at its places. All functions take the support as given:
selection has no gradient. Transforms of `torch.func` work on all of them.

Shape suffixes: B rows, D channels, N latents, K selected latents, V entries of a `vmap`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from mlsae.sae.kernels.sparse import Entries, FullSupport, Support

Tensor = torch.Tensor
Choice = Callable[..., tuple[Tensor, ...]]
_Dims = Sequence[int | None]


def as_given(tensor: Tensor) -> AbstractContextManager[None]:
    """Compute in the dtypes of the tensors, `torch.autocast` or not."""
    without: AbstractContextManager[None] = torch.autocast(tensor.device.type, enabled=False)
    return without


def bag(values_BK: Tensor, W_ND: Tensor, support: Support) -> Tensor:
    """Each row's weighted sum of the rows of its latents, Z W (B, D), with derivatives."""
    if isinstance(support, FullSupport):
        return support.product(values_BK, W_ND)
    return _apply(_Bag, values_BK, W_ND, support.indices_BK, support)


def sampled_product(x_BD: Tensor, W_ND: Tensor, support: Support) -> Tensor:
    """Dot products of each row with the rows of its latents, (B, K), with derivatives."""
    if isinstance(support, FullSupport):
        return support.sampled_product(x_BD, W_ND)
    return _apply(_SampledProduct, x_BD, W_ND, support.indices_BK, support)


def transpose_product(values_BK: Tensor, x_BD: Tensor, support: Support) -> Tensor:
    """Each latent's weighted sum of the rows that use it, Zᵀ X (N, D), with derivatives."""
    if isinstance(support, FullSupport):
        return support.transpose_product(values_BK, x_BD)
    return _apply(_TransposeProduct, values_BK, x_BD, support.indices_BK, support)


def preactivations(
    u_BD: Tensor,
    W_enc_ND: Tensor,
    b_D: Tensor,
    values_BK: Tensor,
    support: Support,
    b_enc_N: Tensor | None = None,
) -> Tensor:
    """W_enc (u − b) + b_enc at the support, (B, K), with derivatives for u and all weights.

    Args:
        u_BD: (B, D) standardised rows.
        W_enc_ND: (N, D) encoder directions.
        b_D: (D,) the bias that is subtracted.
        values_BK: (B, K) the pre-activations themselves, which selection has computed already.
        support: places of the pre-activations.
        b_enc_N: (N,) bias of each latent; None for none.
    """
    places = support.indices_BK
    return _apply(_Preactivations, u_BD, W_enc_ND, b_D, b_enc_N, values_BK, places, support)


def selected(choose: Choice, rows_BD: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
    """`choose(rows, *weights)` without a gradient; in a `vmap`, with all its rows at once.

    Args:
        choose: takes the tensors and gives tensors of B rows.
        rows_BD: (B, D) rows.
        weights: further tensors.
    """
    plain = (None if weight is None else weight.detach() for weight in weights)
    return _select(choose, rows_BD.detach(), *plain)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    apply: Callable[..., Tensor] = function.apply  # torch leaves it untyped
    return apply(*arguments)


def _select(choose: Choice, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    apply: Callable[..., tuple[Tensor, ...]] = _Selected.apply  # torch leaves it untyped
    return apply(choose, *tensors)


def _at(support: Support, indices_BK: Tensor) -> Support:
    """The support of these indices: itself, with what it has sorted, unless a transform is on."""
    if isinstance(support, FullSupport | Entries) or support.indices_BK is indices_BK:
        return support
    return Support(indices_BK, support.num_latents)


class _OfRows(torch.autograd.Function):
    """A function of rows, whose last argument is their support and the one before its indices."""

    by_row: tuple[bool, ...]
    """True for each tensor that has a line a row, and gives a line of the result each."""

    @classmethod
    def batched(cls, info: Any, in_dims: _Dims, *arguments: Any) -> tuple[Tensor, int]:
        """The function of each entry of a `vmap`: of all rows together, or of one after another."""
        *tensors, support = arguments
        is_joint = all(
            by_row or dim is None for by_row, dim in zip(cls.by_row, in_dims, strict=False)
        )
        if not is_joint:
            return _one_by_one(cls, info, in_dims, arguments)
        joined = [
            _joined(tensor, dim, info.batch_size) if by_row and tensor is not None else tensor
            for tensor, dim, by_row in zip(tensors, in_dims, cls.by_row, strict=False)
        ]
        num_rows = len(joined[-1])
        if isinstance(support, FullSupport):
            together: Support = FullSupport(num_rows, support.num_latents, joined[-1].device)
        else:
            together = Support(joined[-1], support.num_latents)
        found = _apply(cls, *joined, together)
        return found.view(info.batch_size, -1, *found.shape[1:]), 0


def _joined(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(V · B, …) of (V, B, …), or of (B, …) for each entry."""
    moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return moved.flatten(0, 1)


def _one_by_one(
    function: type[torch.autograd.Function], info: Any, in_dims: _Dims, arguments: Sequence[Any]
) -> tuple[Tensor, int]:
    found = [
        _apply(
            function,
            *(
                each if dim is None else each.select(dim, entry)
                for each, dim in zip(arguments, in_dims, strict=True)
            ),
        )
        for entry in range(info.batch_size)
    ]
    return torch.stack(found), 0


class _Bag(_OfRows):
    by_row = (True, False, True)

    @staticmethod
    def forward(values_BK: Tensor, W_ND: Tensor, indices_BK: Tensor, support: Support) -> Tensor:
        return _at(support, indices_BK).product(values_BK, W_ND)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_BK, W_ND, support = _kept(ctx)
        need_values, need_W = ctx.needs_input_grad[:2]
        grad_BD = grads[0].contiguous()
        with as_given(grad_BD):
            grad_values = sampled_product(grad_BD, W_ND, support) if need_values else None
            grad_W = transpose_product(values_BK, grad_BD, support) if need_W else None
        return grad_values, grad_W, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        values_BK, W_ND, support = _kept(ctx)
        values, W = tangents[:2]
        return bag(values, W_ND, support) + bag(values_BK, W, support)

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, *arguments: Any) -> tuple[Tensor, int]:
        return _Bag.batched(info, in_dims, *arguments)


class _SampledProduct(_OfRows):
    by_row = (True, False, True)

    @staticmethod
    def forward(x_BD: Tensor, W_ND: Tensor, indices_BK: Tensor, support: Support) -> Tensor:
        return _at(support, indices_BK).sampled_product(x_BD, W_ND)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, W_ND, support = _kept(ctx)
        need_x, need_W = ctx.needs_input_grad[:2]
        with as_given(grads[0]):
            grad_x = bag(grads[0], W_ND, support) if need_x else None
            grad_W = transpose_product(grads[0], x_BD, support) if need_W else None
        return grad_x, grad_W, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x_BD, W_ND, support = _kept(ctx)
        x, W = tangents[:2]
        return sampled_product(x, W_ND, support) + sampled_product(x_BD, W, support)

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, *arguments: Any) -> tuple[Tensor, int]:
        return _SampledProduct.batched(info, in_dims, *arguments)


class _TransposeProduct(torch.autograd.Function):
    @staticmethod
    def forward(values_BK: Tensor, x_BD: Tensor, indices_BK: Tensor, support: Support) -> Tensor:
        return _at(support, indices_BK).transpose_product(values_BK, x_BD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_BK, x_BD, support = _kept(ctx)
        need_values, need_x = ctx.needs_input_grad[:2]
        grad_ND = grads[0].contiguous()
        with as_given(grad_ND):
            grad_values = sampled_product(x_BD, grad_ND, support) if need_values else None
            grad_x = bag(values_BK, grad_ND, support) if need_x else None
        return grad_values, grad_x, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        values_BK, x_BD, support = _kept(ctx)
        values, x = tangents[:2]
        return transpose_product(values, x_BD, support) + transpose_product(values_BK, x, support)

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, *arguments: Any) -> tuple[Tensor, int]:
        return _one_by_one(_TransposeProduct, info, in_dims, arguments)


def _keep(ctx: Any, inputs: tuple[Any, ...]) -> None:
    *tensors, ctx.support = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _kept(ctx: Any) -> tuple[Any, ...]:
    """The tensors but the indices, which the support has, and the support."""
    *tensors, indices_BK = ctx.saved_tensors
    return *tensors, _at(ctx.support, indices_BK)


class _Preactivations(_OfRows):
    by_row = (True, False, False, False, True, True)

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        values_BK: Tensor = arguments[4]
        return values_BK.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        u_BD, W_enc_ND, b_D, _, _, indices_BK, support = inputs
        _keep(ctx, (u_BD, W_enc_ND, b_D, indices_BK, support))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BK,) = grads
        u_BD, W_enc_ND, b_D, support = _kept(ctx)
        need_u, need_W, need_b, need_b_enc = ctx.needs_input_grad[:4]
        with as_given(grad_BK):
            grad_u = bag(grad_BK, W_enc_ND, support) if need_u else None
            grad_W = transpose_product(grad_BK, u_BD - b_D, support) if need_W else None
            grad_b = grad_b_enc = None
            if need_b or need_b_enc:
                # Summed over rows first: one vector through W_enc instead of a bag for each row.
                ones_B1 = u_BD.new_ones(u_BD.shape[0], 1)
                summed_N = transpose_product(grad_BK, ones_B1, support)[:, 0]
                grad_b = -(summed_N @ W_enc_ND) if need_b else None
                grad_b_enc = summed_N if need_b_enc else None
        return grad_u, grad_W, grad_b, grad_b_enc, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        u_BD, W_enc_ND, b_D, support = _kept(ctx)
        u, W, b, b_enc = tangents[:4]
        sampled: Tensor = sampled_product(u - b, W_enc_ND, support)
        sampled = sampled + sampled_product(u_BD - b_D, W, support)
        if b_enc is None:
            return sampled
        of_latents: Tensor = (
            b_enc if isinstance(support, FullSupport) else b_enc[support.indices_BK]
        )
        return sampled + of_latents

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, *arguments: Any) -> tuple[Tensor, int]:
        return _Preactivations.batched(info, in_dims, *arguments)


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(choose: Choice, *tensors: Any) -> tuple[Tensor, ...]:
        return choose(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:  # noqa: ARG004
        raise AssertionError("a selection has no gradient")

    @staticmethod
    def vmap(
        info: Any, in_dims: _Dims, choose: Choice, rows: Tensor, *weights: Any
    ) -> tuple[tuple[Tensor, ...], int]:
        size = info.batch_size
        if any(dim is not None for dim in in_dims[2:]):
            entries = [
                _select(
                    choose,
                    *(
                        each if dim is None else each.select(dim, entry)
                        for each, dim in zip((rows, *weights), in_dims[1:], strict=True)
                    ),
                )
                for entry in range(size)
            ]
            return tuple(torch.stack(found) for found in zip(*entries, strict=True)), 0
        found = _select(choose, _joined(rows, in_dims[1], size), *weights)
        return tuple(each.view(size, -1, *each.shape[1:]) for each in found), 0
