"""A forward pass of plain sequences, with the model's control embeddings if it has them."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from mlsae.base.errors import InputError, MlsaeError
from mlsae.models.families.kinds import DECODER
from mlsae.models.inputs import Inputs
from mlsae.models.passes.control import control_embeddings
from mlsae.models.passes.unchanged import unchanged
from mlsae.models.transformer import Transformer

# The logger is not typed.
_logging: Any = transformers_logging


class PassLeft(Exception):  # noqa: N818
    """Leaves a forward pass early; control flow, never an error."""


def forward(
    transformer: Transformer,
    module: Any,
    inputs: Inputs,
    *,
    extent: int | None = None,
    use_cache: bool = False,
) -> Any:
    """Call `module`, the transformer's `model` or `backbone`.

    The model is afterwards as it was before. `inputs.documents` is ignored: see `documents.passes`.

    Args:
        transformer: the model.
        module: the module to call.
        inputs: the sequences.
        extent: the block in which the caller leaves the pass by `PassLeft`; None for a whole pass.
        use_cache: with a decoder's key-value cache, for which one pass has no use.

    Raises:
        InputError: the pass changed weights.
    """
    arguments: dict[str, Any] = {"input_ids": inputs.tokens.to(transformer.device, torch.long)}
    # Decoders that look both ways are encoders, but some fill a cache unless told not to.
    if transformer.kind == DECODER or "use_cache" in inspect.signature(module.forward).parameters:
        arguments["use_cache"] = use_cache
    is_padded = inputs.padding is not None
    if inputs.padding is not None:
        arguments["attention_mask"] = (~inputs.padding).to(transformer.device, torch.long)
    with (
        _quiet(),
        unchanged(transformer, inputs.tokens.shape[1], is_padded=is_padded, extent=extent),
        control_embeddings(transformer, inputs),
    ):
        return module(**arguments)


@contextmanager
def pass_explained(transformer: Transformer, length: int, *, trial: bool = True) -> Iterator[None]:
    """Turn any exception of the library in a forward pass into one line, full memory apart.

    Args:
        transformer: the model.
        length: tokens of a sequence.
        trial: True for a few tokens, which any model takes.

    Raises:
        InputError: the model cannot be run on sequences of this length.
    """
    try:
        yield
    except (MlsaeError, PassLeft, MemoryError, torch.OutOfMemoryError, Warning):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        cure = "try a smaller --context-length"
        if trial:
            cure = (
                "unless another --attn-implementation or version of transformers runs it, such a "
                "model is not supported"
            )
        raise InputError(
            f"model {transformer.name} cannot be run on sequences of {length} tokens by "
            f"transformers {transformers.__version__} ({type(error).__name__}: {text}); {cure}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what transformers logs about one pass: families say how they adapt to each input."""
    level = _logging.get_verbosity()
    _logging.set_verbosity_error()
    try:
        yield
    finally:
        _logging.set_verbosity(level)
