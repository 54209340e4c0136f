"""Where training runs, and with how many others."""

import os

import torch
from accelerate import Accelerator

from mlsae.base.errors import InputError, ResourceError


def make_accelerator(device: str) -> Accelerator:
    """The Accelerator on `cpu`, `cuda`, `cuda:N` or `auto`: this process's device and its peers.

    Raises:
        InputError: no such name, or one device is named for several processes.
        ResourceError: CUDA, or that device of it, is absent.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ResourceError(
                f"--device {device} was asked for, but this machine has no usable CUDA device; "
                f"use --device cpu"
            )
        if index and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                f"--device {device} names one device for several processes: use --device cuda, "
                f"and each takes its own"
            )
        if index and int(index) >= torch.cuda.device_count():
            raise ResourceError(
                f"--device {device} was asked for, but this machine has "
                f"{torch.cuda.device_count()} CUDA devices; use a smaller number"
            )
        if index:
            torch.cuda.set_device(int(index))
    return Accelerator(cpu=kind == "cpu")
