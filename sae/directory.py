"""The SAE directory: sae.safetensors, config.json, training.json, each checked when read.

config.json is written last and carries the hash of the weights, so a directory that has one was
written whole. Both JSON files carry their own checksum.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mlsae.base.directories import require_outside_stores
from mlsae.base.files import (
    DamagedFileError,
    read_sealed,
    seal,
    sha256_file,
    stand_in,
    write_durably,
)
from mlsae.sae.architectures import registered
from mlsae.sae.config import SAEConfig
from mlsae.sae.errors import DamagedSAEError, NotAnSAEError
from mlsae.sae.location import nothing_at

WEIGHTS, CONFIG, TRAINING = "sae.safetensors", "config.json", "training.json"
FILES = (WEIGHTS, CONFIG, TRAINING)
_PREFIX = "mlsae/"
"""Prefix of an architecture's name in config.json."""


def write(
    directory: Path,
    config: SAEConfig,
    tensors: Mapping[str, torch.Tensor],
    training: Mapping[str, Any],
) -> None:
    """Write the three files durably, config.json last.

    Args:
        directory: made if it is not there.
        config: goes into config.json.
        tensors: the architecture's parameters and the state of layers (sae/normalize.py).
        training: training.json's content.
    """
    record = seal(training)
    require_outside_stores(directory, "the SAE")
    directory.mkdir(parents=True, exist_ok=True)
    write_durably(directory / WEIGHTS, serialized(tensors))
    write_durably(directory / TRAINING, record)
    content = {
        **config.to_dict(),
        "architecture": f"{_PREFIX}{config.architecture.name}",
        "weights_sha256": sha256_file(directory / WEIGHTS),
    }
    write_durably(directory / CONFIG, seal(content))


def serialized(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors by name as a safetensors file."""
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )


def read(directory: Path) -> tuple[SAEConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """Read and check the three files.

    Returns:
        The configuration, the tensors on the CPU, training.json's content.

    Raises:
        NotAnSAEError: there is no SAE there.
        DamagedSAEError: a file is missing or does not hold the bytes that were written.
        InputError: a configuration key is unknown or missing.
    """
    path = directory / CONFIG
    content = _read_config(directory)
    expected_digest = content.pop("weights_sha256")
    content["architecture"] = content["architecture"].removeprefix(_PREFIX)
    config = SAEConfig.from_dict(content, str(path))
    for name in (WEIGHTS, TRAINING):
        if not (directory / name).is_file():
            raise DamagedSAEError(
                f"{directory / name} is missing: expected {WEIGHTS}, {CONFIG} and {TRAINING} "
                f"side by side; copy the whole directory again"
            )
    try:
        training = read_sealed(directory / TRAINING)
    except DamagedFileError as error:
        raise DamagedSAEError(str(error)) from error
    digest = sha256_file(directory / WEIGHTS)
    if digest != expected_digest:
        if found := stand_in(directory / WEIGHTS):
            raise DamagedSAEError(f"{directory / WEIGHTS} {found}")
        raise DamagedSAEError(
            f"{directory / WEIGHTS} is damaged: expected SHA-256 "
            f"{expected_digest[:12]}, got {digest[:12]}; copy the directory again"
        )
    return config, safetensors.torch.load_file(directory / WEIGHTS), training


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not directory.is_dir():
        raise NotAnSAEError(f"there is no SAE at {directory}: no such directory")
    if not path.is_file():
        if below := [f"{file.parent.name}/{WEIGHTS}" for file in directory.glob(f"*/{WEIGHTS}")]:
            raise NotAnSAEError(nothing_at(str(directory), below, (WEIGHTS,), f"{directory}/"))
        raise NotAnSAEError(
            f"{directory} is no SAE directory: it has no {CONFIG}; "
            f"expected the --out of a finished `mlsae train`"
        )
    known = [f"{_PREFIX}{kind.name}" for kind in registered()]
    try:
        foreign = json.loads(path.read_bytes()).get("architecture") not in known
    except (ValueError, AttributeError, TypeError):
        foreign = False  # Not even JSON: read_sealed says so.
    if foreign:
        raise NotAnSAEError(
            f"{path} does not describe an SAE of mlsae: expected architecture "
            f"{' or '.join(map(repr, known))}; `mlsae import` converts SAEs of other tools"
        )
    try:
        return read_sealed(path)
    except DamagedFileError as error:
        raise DamagedSAEError(str(error)) from error
