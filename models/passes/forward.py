"""One forward call of a model, or of its backbone alone."""

from typing import Any

import torch

from mlsae.models.families.kinds import DECODER
from mlsae.models.inputs import Inputs
from mlsae.models.passes.control import control_embeddings
from mlsae.models.transformer import Transformer


def forward(transformer: Transformer, module: Any, inputs: Inputs) -> Any:
    """Call `module`, the transformer's `model` or `backbone`, without a key-value cache.

    `inputs.documents` is ignored: see `documents.passes`.
    """
    arguments: dict[str, Any] = {"input_ids": inputs.tokens.to(transformer.device, torch.long)}
    if transformer.kind == DECODER:
        arguments["use_cache"] = False
    if inputs.padding is not None:
        arguments["attention_mask"] = (~inputs.padding).to(transformer.device, torch.long)
    with control_embeddings(transformer, inputs):
        return module(**arguments)
