"""Which implementations of attention a model can be run with."""

from typing import Any

import torch

from mlsae.base.errors import InputError
from mlsae.models.kinds import auto_class, construction

_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def check_attention(config: Any, kind: str, asked: str | None) -> None:
    """Refuse an implementation with which this model cannot be built here.

    Raises:
        InputError: naming those that work.
    """
    if asked is None or (asked in _IMPLEMENTATIONS and _works(config, kind, asked)):
        return
    working = [name for name in _IMPLEMENTATIONS if _works(config, kind, name)]
    raise InputError(
        f"--attn-implementation {asked} does not work with a model of type {config.model_type} "
        f"here; use {' or '.join(working)}"
    )


def _works(config: Any, kind: str, implementation: str) -> bool:
    """Whether the model can be built with it, tried without memory for weights."""
    try:
        with torch.device("meta"):
            auto_class(kind).from_config(
                config,
                attn_implementation=implementation,
                trust_remote_code=False,
                **construction(config, kind),
            )
    except (ValueError, ImportError):
        return False
    return True
