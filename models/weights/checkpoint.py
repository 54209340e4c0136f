"""A model in memory against its checkpoint: no weight missing, none left out, none misread."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.quantizers import auto

from mlsae.base.errors import InputError
from mlsae.base.units import counted

# Quantizers are not typed.
_quantizer: Any = auto.AutoHfQuantizer

WRAPPERS = (
    r"_orig_mod\.",
    r"_fsdp_wrapped_module\.",
    r"_checkpoint_wrapped_module\.",
    r"^module\.",
)
"""Parts that torch's wrappers add to the names of weights, as regular expressions."""

_COMPUTED = {"inv_freq", "position_ids", "masked_bias", "causal_mask"}

_NUMBERS = {"F64", "F32", "F16", "BF16"}
"""Types in safetensors files that are numbers as they are, not codes of a quantisation."""


def check_quantization(config: Any, name: str) -> None:
    """Refuse a quantisation that transformers would pass over.

    Raises:
        InputError: the config names a quantisation that this version does not know.
    """
    for each in (config, config.get_text_config()):
        quantization = getattr(each, "quantization_config", None)
        if quantization is None:
            continue
        if not isinstance(quantization, Mapping):
            quantization = quantization.to_dict()
        method = quantization.get("quant_method")
        if method is None or not _quantizer.supports_quant_method(dict(quantization)):
            raise InputError(
                f"model {name} is quantised by {method!r}, which transformers "
                f"{transformers.__version__} does not know: its weights would be read as if they "
                "were not quantised; give a copy in float32, float16 or bfloat16"
            )


def check_codes(model: Any, folder: Path | None, name: str) -> None:
    """Refuse weights that are codes of a quantisation of which the config says nothing.

    Args:
        model: the loaded model.
        folder: directory of its files, where it is known.
        name: name that the user gave the model.

    Raises:
        InputError: a file holds a weight in 8-bit floating point or in integers.
    """
    if folder is None or getattr(model, "hf_quantizer", None) is not None:
        return
    for file in sorted(folder.glob("model*.safetensors")):
        for key, entry in _header(file).items():
            if key.endswith("weight") and entry["dtype"] not in _NUMBERS:
                raise InputError(
                    f"{key} of model {name} is stored as {entry['dtype']}, and config.json has no "
                    "quantization_config that says how such codes become numbers; give a copy in "
                    "float32, float16 or bfloat16"
                )


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return header


def is_wrapped(unexpected: Iterable[str]) -> bool:
    """True where files name weights as torch's wrappers do."""
    return any(re.search("|".join(WRAPPERS), key) for key in unexpected)


def lacks_head(model: Any, info: Mapping[str, Any], name: str) -> bool:
    """Check that all weights of the backbone are there, and say if those of the head are not.

    Args:
        model: the loaded model.
        info: loading info, as transformers returns it.
        name: name that the user gave the model.

    Raises:
        InputError: a weight of the backbone is missing or has another shape.
    """
    # A mismatched key is a name, or a name with both shapes, by version.
    mismatched = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    lacking = sorted({*info["missing_keys"], *mismatched})
    backbone = model.base_model
    inside = [
        key for key in lacking if backbone is model or key.startswith(f"{model.base_model_prefix}.")
    ]
    if inside:
        cure = "fetch the model again"
        if strangers := sorted(info["unexpected_keys"]):
            cure = (
                f"they hold {counted(len(strangers), 'weight')} by other names, the first "
                f"{strangers[0]}: give weights and config.json that belong together"
            )
        raise InputError(
            f"model {name} is incomplete: its files lack {len(inside)} of its weights or hold them "
            f"in another shape, the first {inside[0]}; {cure}"
        )
    return bool(lacking)


def left_out(
    backbone: nn.Module, prefix: str, blocks_path: str, unexpected: Iterable[str], name: str
) -> str | None:
    """Check weights of the files that the model has no place for.

    Args:
        backbone: the model without its head.
        prefix: name of the backbone in the whole model.
        blocks_path: dotted name of the list of blocks in the backbone.
        unexpected: names in the files for which the model has no place.
        name: name that the user gave the model.

    Returns:
        A line on weights that belong to no block, embedding or norm; None where there are none.

    Raises:
        InputError: a module that the model uses has such a weight, which would change its values.
    """
    modules = dict(backbone.named_modules())
    computed = {name for name, _ in backbone.named_buffers()}
    # Children of these may be heads, poolers or blocks beyond the config's number.
    above = {"", *_parents(blocks_path), blocks_path}
    owned: list[str] = []
    others: list[str] = []
    for key in sorted(unexpected):
        inner = key.removeprefix(f"{prefix}.")
        if inner not in computed and not _is_computed(modules, inner):
            owner = next((path for path in _parents(inner) if path in modules), "")
            (others if owner in above else owned).append(key)
    if owned:
        raise InputError(
            f"model {name} is not what its files hold: the model that config.json describes has no "
            f"place for {counted(len(owned), 'weight')}, the first {owned[0]}, and computes other "
            "values without; give the config.json that belongs to the weights"
        )
    if not others:
        return None
    return (
        f"left out: {counted(len(others), 'weight')} in the files of {name} outside its blocks, "
        f"embeddings and norms, the first {others[0]}"
    )


def _is_computed(modules: Mapping[str, nn.Module], name: str) -> bool:
    """True for a mask or a table of positions, saved by older versions and computed by this one."""
    owner, _, leaf = name.rpartition(".")
    # The causal mask was called the bias of attention, which has none of its own.
    is_mask = leaf == "bias" and owner in modules and not modules[owner]._parameters
    return is_mask or leaf in _COMPUTED


def _parents(path: str) -> list[str]:
    """Dotted names above a dotted name, the longest first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
