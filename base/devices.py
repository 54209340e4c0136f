"""From the name of a device to the device, refused in one line where it is absent."""

import torch

from mlsae.base.errors import InputError, ResourceError
from mlsae.base.ranks import environment_number
from mlsae.base.units import counted


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` → device.

    `auto` is CUDA where there is any, else the CPU. Without a number, CUDA means the device of
    this process's LOCAL_RANK, so that each of several processes on a machine has its own.

    Raises:
        InputError: not such a name.
        ResourceError: CUDA, or that device of it, is absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ResourceError(
                f"--device {name} was asked for, but this machine has no usable CUDA device; "
                "use --device cpu"
            )
        index = environment_number("LOCAL_RANK", 0) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ResourceError(
                f"--device cuda:{index} was asked for, but this machine has "
                f"{counted(torch.cuda.device_count(), 'CUDA device')}; use a smaller number or "
                "fewer processes"
            )
        return torch.device("cuda", index)
    return device
