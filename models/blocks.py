"""Where a transformer's blocks are and what they return, found by structure, not by family name."""

from typing import Any

import torch
from torch import nn

from mlsae.base.errors import InputError


def find_blocks(backbone: nn.Module, num_layers: int) -> list[nn.Module]:
    """The blocks of a decoder in order: the `nn.ModuleList` in it with one entry a layer.

    Where several lists have that length (eight experts inside each of eight blocks, say), the
    blocks are the list that holds the most parameters, because it contains the others.

    Args:
        backbone: the transformer without its language-model head.
        num_layers: the number of blocks its config names.

    Raises:
        InputError: no list of that length.
    """
    lists = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    candidates = [module for _, module in lists if len(module) == num_layers]
    if not candidates:
        found = ", ".join(f"{name} ({len(module)})" for name, module in lists) or "none"
        raise InputError(
            f"cannot find the blocks of {type(backbone).__name__}: expected an nn.ModuleList of "
            f"{num_layers} blocks (num_hidden_layers of its config), found lists: {found}"
        )
    blocks: nn.ModuleList = max(candidates, key=_num_parameters)
    return list(blocks)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden state in a block's output, which is a tensor or a tuple that opens with it."""
    hidden = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(hidden, torch.Tensor):
        raise InputError(
            f"a block returned {type(hidden).__name__} where its hidden state was expected"
        )
    return hidden


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A block's output with `hidden` in the place of its hidden state."""
    return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])
