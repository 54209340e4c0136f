"""Tensors that enter and leave each module of a block while tokens pass through it.

N = tokens of the pass, d = d_model.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Side:
    """A tensor at one side of a module."""

    argument: int | str | None
    """Position or keyword of the argument; None for an output."""
    value: Tensor
    """(N, d), a copy from that moment."""
    live: Tensor
    """The model's own tensor."""

    def overwritten(self) -> bool:
        """True if the model has written into its own tensor since."""
        return not torch.equal(self.live.reshape(self.value.shape), self.value)


@dataclass(kw_only=True)
class Call:
    """The only call of a module in a pass; times count beginnings and ends of calls."""

    name: str
    """Dotted name inside the block; empty for the block itself."""
    takes_mask: bool
    """True for a module that takes an attention mask, as attention does and little else."""
    start: int
    end: int = 0
    entered: Side | None = None
    """First argument of the stream's shape; None where there is none."""
    left: Side | None = None
    """Output, or the first of several; None where that has another shape."""
    shape: tuple[int, ...] | None = None
    """Shape of that output; None where it is no tensor."""


@contextmanager
def noted(block: nn.Module, num_tokens: int, d_model: int) -> Iterator[dict[str, Call]]:
    """Note the calls of a block and of every module in it, by name, in the order they begin.

    A module that is called twice is left out, because it is not a single point of the block.
    """
    calls: dict[str, Call] = {}
    repeated: set[str] = set()
    clock = iter(range(2**62))

    def side(tensor: Any, argument: int | str | None) -> Side | None:
        if not isinstance(tensor, Tensor) or tensor.numel() != num_tokens * d_model:
            return None
        if tensor.shape[-1] != d_model:
            return None
        return Side(argument=argument, value=tensor.reshape(-1, d_model).clone(), live=tensor)

    def watch(name: str, module: nn.Module) -> list[Any]:
        takes_mask = any("mask" in key for key in inspect.signature(module.forward).parameters)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in calls:
                repeated.add(name)
            call = Call(name=name, takes_mask=takes_mask and name != "", start=next(clock))
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            sides = (side(tensor, argument) for argument, tensor in given.items())
            call.entered = next((found for found in sides if found), None)
            calls[name] = call

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            call = calls[name]
            call.end, call.left = next(clock), side(first, None)
            call.shape = tuple(first.shape) if isinstance(first, Tensor) else None

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    handles = [handle for entry in block.named_modules() for handle in watch(*entry)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for name in repeated:
            del calls[name]
