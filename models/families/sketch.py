"""A model without memory for its weights: sizes, and the attention it can be built with."""

from typing import Any

import torch

from mlsae.base.errors import InputError
from mlsae.models.families.attention import BY_BLOCKS, takes_blocks
from mlsae.models.families.kinds import auto_class, construction

_ATTENTION = (
    "eager", "sdpa", BY_BLOCKS, "flash_attention_2", "flash_attention_3", "flex_attention",
)  # fmt: skip


def sketch(config: Any, kind: str, attention_implementation: str | None = None) -> Any:
    """Build the model that a config describes, with all tensors on torch's `meta` device.

    Raises:
        InputError: the model cannot be built with that implementation here; the message names
            the implementations that work.
    """
    if attention_implementation is None:
        return _build(config, kind, None)
    if attention_implementation in _ATTENTION:
        try:
            return _build(config, kind, attention_implementation)
        except (ValueError, ImportError):
            pass
    working = [name for name in _ATTENTION if _can_build(config, kind, name)]
    raise InputError(
        f"--attn-implementation {attention_implementation} does not work with a model of type "
        f"{config.model_type} here; use {' or '.join(working)}"
    )


def _build(config: Any, kind: str, attention_implementation: str | None) -> Any:
    by_blocks = attention_implementation == BY_BLOCKS
    with torch.device("meta"):
        model = auto_class(config, kind).from_config(
            config,
            # Families that do not ask for it by name may stumble over a name that is ours.
            attn_implementation="sdpa" if by_blocks else attention_implementation,
            trust_remote_code=False,
            **construction(config, kind),
        )
    if by_blocks and not takes_blocks(model):
        raise ValueError(f"{config.model_type} does not ask transformers for its attention")
    return model


def _can_build(config: Any, kind: str, attention_implementation: str) -> bool:
    try:
        _build(config, kind, attention_implementation)
    except (ValueError, ImportError):
        return False
    return True
