"""The live model with one block's output replaced, for what a reconstruction costs downstream.

B = sequences, T = positions of a sequence, d = d_model, V = vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mlsae.models.blocks import hidden_of, with_hidden
from mlsae.models.transformer import Transformer


@torch.no_grad()
def run(transformer: Transformer, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of the whole model, in its dtype on its device."""
    output = transformer.model(
        input_ids=tokens_BT.to(transformer.device, torch.long), use_cache=False
    )
    return output.logits  # type: ignore[no-any-return]


def spliced(
    transformer: Transformer,
    tokens_BT: torch.Tensor,
    layer: int,
    replace: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Logits (B, T, V) with `resid_post` of one layer replaced while the model runs.

    Args:
        transformer: the model.
        tokens_BT: token ids (B, T).
        layer: the block whose output is replaced.
        replace: from the live activation (B, T, d) to what the next block shall see, the same
            shape; cast to the model's dtype. It must not write into its argument.

    Raises:
        InputError: a layer the model does not have.
        ValueError: `replace` returned another shape.
    """
    transformer.check_layers([layer])

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        live = hidden_of(output)
        new = replace(live)
        if new.shape != live.shape:
            raise ValueError(
                f"replace must keep the shape {tuple(live.shape)}, got {tuple(new.shape)}"
            )
        return with_hidden(output, new.to(live))

    handle = transformer.blocks[layer].register_forward_hook(hook)
    try:
        return run(transformer, tokens_BT)
    finally:
        handle.remove()
