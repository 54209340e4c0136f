"""Where training runs, and with how many others."""

import os

import torch
from accelerate import Accelerator

from mlsae.base.devices import resolve_device
from mlsae.base.errors import InputError


def make_accelerator(name: str) -> Accelerator:
    """The Accelerator on `cpu`, `cuda`, `cuda:N` or `auto`: this process's device and its peers.

    Raises:
        InputError: no such name, or one device is named for several processes.
        ResourceError: CUDA, or that device of it, is absent.
    """
    device = resolve_device(name)
    if device.type == "cuda":
        if ":" in name and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                f"--device {name} names one device for several processes: use --device cuda, "
                f"and each takes its own"
            )
        torch.cuda.set_device(device)
    return Accelerator(cpu=device.type == "cpu")


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
