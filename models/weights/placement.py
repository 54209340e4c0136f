"""Placement of a model's weights: on one device, or spread by accelerate over several."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory

from mlsae.base.errors import InputError, ResourceError
from mlsae.base.machine.resources import require_memory


def check_device_map(device_map: str | None) -> None:
    """Refuse a device map that does not exist.

    Raises:
        InputError: the device map is neither None nor `auto`.
    """
    if device_map not in (None, "auto"):
        raise InputError(f"--device-map must be auto, got {device_map!r}")


def require_memory_for(outline: Any, dtype: torch.dtype | None, name: str) -> None:
    """Refuse a model whose weights do not fit into this machine's memory.

    Args:
        outline: the model on the `meta` device.
        dtype: dtype of the weights; None where only the files know, counted as 2 bytes.
        name: name that the user gave the model.

    Raises:
        ResourceError: too little memory; the message names the needed and the available bytes.
    """
    size = 2 if dtype is None else dtype.itemsize
    require_memory(
        size * sum(parameter.numel() for parameter in outline.parameters()),
        f"the weights of {name}",
        "use a smaller --model-dtype, --device-map auto or a smaller model",
    )


@contextmanager
def full_memory_explained(name: str, where: str, remedy: str) -> Iterator[None]:
    """Turn a device that is full, met while weights are put there, into one line.

    Raises:
        ResourceError: the device has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"not enough memory {where} for the weights of {name}; use {remedy} or a smaller "
            "--model-dtype"
        ) from error


def move(model: Any, device: str | torch.device, name: str) -> None:
    """Put a whole model on one device.

    Raises:
        ResourceError: the device has too little memory.
    """
    with full_memory_explained(name, f"on {device}", "--device-map auto, another --device"):
        model.to(device)


def dispatch(model: Any, name: str) -> None:
    """Spread a model that lies in the CPU's memory over all GPUs, the rest staying where it is.

    Args:
        model: a transformers model.
        name: name that the user gave the model.

    Raises:
        ResourceError: a GPU has too little memory for its part.
    """
    memory = get_max_memory()
    # Memory that the model takes now is free for its parts.
    memory["cpu"] += sum(p.numel() * p.element_size() for p in model.parameters())
    blocks = model._no_split_modules
    balanced = get_balanced_memory(model, memory, no_split_module_classes=blocks)
    device_map = infer_auto_device_map(model, balanced, no_split_module_classes=blocks)
    with full_memory_explained(name, "of the GPUs", "fewer processes"):
        dispatch_model(model, device_map, skip_keys=model._skip_keys_device_placement)


def input_device(model: Any) -> torch.device:
    """Device of a model's token embedding, which takes the tokens."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    for part in (hook, *getattr(hook, "hooks", ())):
        if getattr(part, "execution_device", None) is not None:
            return torch.device(part.execution_device)
    return torch.device(embedding.weight.device)
