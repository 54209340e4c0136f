"""Where training runs, and with how many others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from mlsae.base.devices import resolve_device
from mlsae.base.errors import InputError
from mlsae.base.ranks import Ranks

_RANKS = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that each of several processes needs, beside RANK and WORLD_SIZE."""
_OTHERS = "ACCELERATE_"
"""Beginning of variables for other ways to train, from a file that `accelerate config` wrote."""


def make_accelerator(name: str) -> Accelerator:
    """The Accelerator on `cpu`, `cuda`, `cuda:N` or `auto`: this process's device and its peers.

    Raises:
        InputError: no such name, one device is named for several processes, or the environment
            tells of several processes and not of all that they need.
        ResourceError: CUDA, or that device of it, is absent.
    """
    ranks = Ranks.from_environment(*_RANKS)
    device = resolve_device(name)
    if device.type == "cuda":
        if ":" in name and ranks.world_size > 1:
            raise InputError(
                f"--device {name} names one device for several processes: use --device cuda, "
                f"and each takes its own"
            )
        torch.cuda.set_device(device)
    with _hidden(ranks):
        return Accelerator(cpu=device.type == "cpu")


@contextmanager
def _hidden(ranks: Ranks) -> Iterator[None]:
    """Hide variables that a run has no use for, and those of ranks from a single process.

    A shell, a notebook or a platform may have left either there.
    """
    names = {name for name in os.environ if name.startswith(_OTHERS)}
    if ranks.world_size == 1:
        names |= {"RANK", "WORLD_SIZE", *_RANKS} & os.environ.keys()
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


class Alone:
    """Stands in an Accelerator's place where a rank trains SAEs of its own.

    Args:
        device: device of the rank.
    """

    num_processes = 1
    process_index = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reduce(self, tensor: torch.Tensor, _how: str) -> torch.Tensor:
        """The sum over one rank."""
        return tensor
