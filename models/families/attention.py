"""Causal attention in bfloat16 on a CPU, by blocks of queries: an implementation of transformers.

On processors that multiply bfloat16 without matrix units torch's kernel takes two to three times as
long as products of some queries with all keys up to theirs, few enough at once that scores stay in
the cache. Scores and probabilities are rounded to bfloat16, as in the `eager` attention of
transformers.

B = sequences, H = heads, T = positions, d = channels of a head.
"""

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from mlsae.base.machine.processor import has_fast_bfloat16, has_matrix_units

BY_BLOCKS = "sdpa_by_blocks"
"""Name of the implementation in transformers, in configs and in plans."""

_FEW_QUERIES, _MANY_QUERIES, _MANY_POSITIONS = 128, 256, 1024
"""Queries at once, and the number of positions from which on they are many; measured best of 64 to
512. Half of a block's last scores are masked, but small products are slow."""
_SCORES = 2**21
"""Scores at once, 4 MiB, unless a single sequence has more."""
_LEAST_POSITIONS = 256
"""Below this torch's kernel is as fast."""
_CHANGING = ("softcap", "position_bias", "cache")
"""Keyword arguments that change the result of a call."""


@functools.cache
def register() -> None:
    """Make the implementation known to transformers under its name.

    Needed before a model of that implementation is loaded. The modules of transformers that it
    takes, which load torch's compiler, are imported with the first model and not before.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BY_BLOCKS, attention_by_blocks)
    AttentionMaskInterface.register(BY_BLOCKS, sdpa_mask)


def blocks_pay(model: Any, device: torch.device) -> bool:
    """True for a model that computes its attention faster by blocks on this machine.

    Args:
        model: a loaded transformers model.
        device: device of its token embedding.
    """
    return (
        device.type == "cpu"
        and model.dtype == torch.bfloat16
        and model.config._attn_implementation == "sdpa"
        and has_fast_bfloat16()
        and not has_matrix_units()
        and takes_blocks(model)
    )


def takes_blocks(model: Any) -> bool:
    """True for a model of a family that asks transformers for its attention by name.

    Other families compute attention themselves, or prepare masks for `sdpa` by that very name.
    """
    backbone = type(model.base_model)
    source = inspect.getsource(sys.modules[backbone.__module__])
    asks_by_name = "ALL_ATTENTION_FUNCTIONS" in source and '"sdpa"' not in source
    return asks_by_name and bool(backbone._supports_sdpa)


def attention_by_blocks(
    module: nn.Module,
    query_BHTd: Tensor,
    key_BHTd: Tensor,
    value_BHTd: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention (B, T, H, d) of a module, and None for its probabilities.

    Causal attention over at least 256 positions without a mask, in bfloat16 on a CPU, is computed
    by blocks of queries; every other call goes to the `sdpa` of transformers as it is. The
    signature is common to all implementations of transformers.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and dropout == 0 and all(more.get(k) is None for k in _CHANGING)
    tensors = (query_BHTd, key_BHTd, value_BHTd)
    if (
        causal
        and plain
        and query_BHTd.shape[2] == key_BHTd.shape[2] >= _LEAST_POSITIONS
        and all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)
    ):
        return _in_blocks(*tensors, scaling), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, *tensors, attention_mask, dropout, scaling, is_causal, **more
    )


def _in_blocks(
    query_BHTd: Tensor,
    key_BHTd: Tensor,
    value_BHTd: Tensor,
    scale: float | None,
) -> Tensor:
    num_sequences, num_heads, num_positions, width = query_BHTd.shape
    if key_BHTd.shape[1] < num_heads:
        key_BHTd, value_BHTd = (
            x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (key_BHTd, value_BHTd)
        )
    # Laid out as models join heads, which saves them a copy.
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
    return out_BTHd
