"""Causal attention in bfloat16 on a CPU, by blocks of queries.

On processors that multiply bfloat16 without matrix units torch's kernel for it takes two to three
times as long as products of some queries with all keys up to theirs, few enough at once that scores
stay in the cache. Scores and probabilities are rounded to bfloat16, as in the `eager` attention of
transformers.

B = sequences, H = heads, T = positions, d = channels of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from mlsae.base.machine.processor import has_fast_bfloat16, has_matrix_units

_FEW_QUERIES, _MANY_QUERIES, _MANY_POSITIONS = 128, 256, 1024
"""Queries at once, and from how many positions on they are many: measured best of 64 to 512. Half
of a block's last scores are of no use, but small products are slow."""
_SCORES = 2**21
"""Scores at once, 4 MiB, unless a single sequence has more."""
_LEAST_POSITIONS = 256
"""Of shorter sequences torch's kernel is as fast."""


class BlockedAttention(TorchFunctionMode):
    """While entered, causal attention that pays for it is computed in blocks.

    What has a mask, another dtype or device, or dropout goes to torch as ever.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and _pays(*args, **kwargs):
            return _in_blocks(*args, **kwargs)
        return func(*args, **kwargs)


def blocks_pay(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model's attention is worth `BlockedAttention` on this machine."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and has_fast_bfloat16()
        and not has_matrix_units()
    )


def _pays(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> bool:
    return (
        is_causal
        and attn_mask is None
        and dropout_p == 0
        and query.dim() == 4
        and query.shape[2] == key.shape[2] >= _LEAST_POSITIONS
        and all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in (query, key, value))
    )


def _in_blocks(
    query_BHTd: Tensor,
    key_BHTd: Tensor,
    value_BHTd: Tensor,
    *_: Any,
    scale: float | None = None,
    enable_gqa: bool = False,
    **__: Any,
) -> Tensor:
    num_sequences, num_heads, num_positions, width = query_BHTd.shape
    if enable_gqa:
        key_BHTd, value_BHTd = (
            x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (key_BHTd, value_BHTd)
        )
    # In the order in which models join heads, so that this costs them no copy.
    out_BTHd = query_BHTd.new_empty(num_sequences, num_positions, num_heads, value_BHTd.shape[3])
    num_queries = _FEW_QUERIES if num_positions < _MANY_POSITIONS else _MANY_QUERIES
    later = query_BHTd.new_full((num_queries, num_queries), -torch.inf).triu(1)
    at_once = max(1, _SCORES // (num_heads * num_queries * num_positions))
    for first in range(0, num_sequences, at_once):
        of = slice(first, first + at_once)
        queries, keys, values = (
            x[of].reshape(-1, num_positions, x.shape[3]) for x in (query_BHTd, key_BHTd, value_BHTd)
        )
        for start in range(0, num_positions, num_queries):
            stop = min(start + num_queries, num_positions)
            scores = torch.baddbmm(
                queries.new_zeros(1),
                queries[:, start:stop],
                keys[:, :stop].transpose(1, 2),
                beta=0,
                alpha=width**-0.5 if scale is None else scale,
            )
            # Adding takes a third of the time of `masked_fill_`.
            scores[:, :, start:] += later[: stop - start, : stop - start]
            found = torch.softmax(scores, dim=2) @ values[:, :stop]
            out_BTHd[of, start:stop] = found.reshape(
                -1, num_heads, stop - start, found.shape[2]
            ).transpose(1, 2)
    return out_BTHd.transpose(1, 2)
