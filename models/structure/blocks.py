"""Blocks of a transformer and the hidden state in their output, found by structure, not by name."""

from typing import Any

import torch
from torch import nn

from mlsae.base.errors import InputError
from mlsae.base.units import counted


def find_blocks(
    backbone: nn.Module,
    num_layers: int,
    path: str | None = None,
    *,
    within: nn.Module | None = None,
) -> tuple[str, list[nn.Module]]:
    """Find the blocks of a transformer in order: the `nn.ModuleList` with one entry a layer.

    Where several lists have that length (eight experts inside each of eight blocks, say), the
    blocks are the list that holds the most parameters, because it contains the others.

    Args:
        backbone: the transformer without its language-model head.
        num_layers: the number of blocks its config names.
        path: dotted name of the list inside the backbone, for a model whose blocks are not found;
            any length is accepted.
        within: the part of the backbone that reads text, where it also has one that sees images.

    Returns:
        The dotted name of the list inside the backbone, and the blocks.

    Raises:
        InputError: no list of that length, or `path` is not a list of modules.
    """
    lists = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    found = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
    if path is not None:
        if path not in lists:
            raise InputError(
                f"--blocks {path}: {type(backbone).__name__} has no list of modules of that name; "
                f"its lists (and their lengths): {found}"
            )
        return path, list(lists[path])
    fitting = [name for name, module in lists.items() if len(module) == num_layers]
    inside = set(() if within is None else within.modules())
    fitting = [name for name in fitting if lists[name] in inside] or fitting
    if not fitting:
        raise InputError(
            f"cannot find the blocks of {type(backbone).__name__}: expected a list of "
            f"{counted(num_layers, 'module')} (num_hidden_layers of its config), "
            f"found lists (and their lengths): {found}; "
            "name the one that holds the blocks with --blocks PATH"
        )
    largest = max(fitting, key=lambda name: _num_parameters(lists[name]))
    return largest, list(lists[largest])


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden state in a block's output, which is a tensor or a tuple that opens with it."""
    hidden = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(hidden, torch.Tensor):
        raise InputError(
            f"a block returned {type(hidden).__name__} where its hidden state was expected"
        )
    return hidden


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A block's output with `hidden` in the place of its hidden state."""
    return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])
