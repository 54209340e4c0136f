"""Identity of a model: a hash of its weights and a hash of its config."""

import hashlib
import json
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from mlsae.base.files import canonical_json

# Another path, version of the library, class (with or without a head) or precision of the loaded
# weights (recorded beside the config) does not make another architecture.
_NOT_ARCHITECTURE = (
    "_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype"
)  # fmt: skip


def weights_sha256(model: nn.Module) -> str:
    """Hex SHA-256 of a model's state: for each entry, by sorted name, name, shape, dtype, bytes.

    Entries are the parameters and persistent buffers of `state_dict`; tied weights count under
    each of their names. Bytes are the row-major values as loaded, so the precision matters and
    the device does not. Weights that accelerate keeps off the model's device are read one by one.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type == "meta":
            tensor = _offloaded(model, name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(canonical_json([name, list(tensor.shape), dtype]))
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(values.numpy()))
    return digest.hexdigest()


def _offloaded(model: nn.Module, name: str) -> torch.Tensor:
    """Value of an entry that only its module's hook holds, in memory or on disk."""
    path, _, entry = name.rpartition(".")
    module = model.get_submodule(path)
    with align_module_device(module, torch.device("cpu")):
        return getattr(module, entry).detach().clone()  # type: ignore[no-any-return]


def config_sha256(config: Any) -> str:
    """Hex SHA-256 of the canonical JSON of a transformers config, every resolved default in it."""
    content = json.loads(config.to_json_string(use_diff=False))
    for key in _NOT_ARCHITECTURE:
        content.pop(key, None)
    return hashlib.sha256(canonical_json(content)).hexdigest()
