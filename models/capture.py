"""The residual stream after each block, from one pass of the backbone.

B = sequences, T = positions of a sequence, d = d_model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mlsae.models.blocks import hidden_of
from mlsae.models.transformer import Transformer


class _LastBlockDone(Exception):  # noqa: N818
    """Leaves a forward pass after the last block asked for; control flow, never an error."""


@torch.no_grad()
def capture(
    transformer: Transformer, tokens_BT: torch.Tensor, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """`resid_post` of the layers asked for: the output of each block, before any final norm.

    Only the backbone runs, without a key-value cache, and it stops after the last of `layers`.

    Args:
        transformer: the model.
        tokens_BT: token ids (B, T), any integer dtype, on any device.
        layers: block indices, in any order.

    Returns:
        For each layer, ascending, a tensor (B, T, d) in the model's dtype on the block's device.
        It is the model's own tensor, not a copy.

    Raises:
        InputError: a layer the model does not have.
    """
    wanted = transformer.check_layers(layers)
    captured: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            captured[layer] = hidden_of(output)
            if layer == wanted[-1]:
                raise _LastBlockDone

        return hook

    handles = [transformer.blocks[layer].register_forward_hook(keep(layer)) for layer in wanted]
    try:
        transformer.backbone(
            input_ids=tokens_BT.to(transformer.device, torch.long), use_cache=False
        )
    except _LastBlockDone:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return captured
