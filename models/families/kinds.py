"""Kind of a transformer, from its config, and the class that loads it.

A decoder is a causal language model, loaded with its head; an encoder (the BERT family, and a
decoder that looks both ways) has no next token to predict and is loaded without one.
"""

import inspect
from typing import Any

import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from mlsae.base.errors import InputError

DECODER = "decoder"
ENCODER = "encoder"

# The auto classes are typed too loosely to be checked here.
_auto: Any = modeling_auto


def kind_of(config: Any, name: str) -> str:
    """Kind of a model by its config: `decoder` or `encoder`.

    The library also has causal language models for configs of encoders. Their attention is still
    bidirectional unless the config says `is_decoder`; such a config is an encoder. A decoder has
    to prove itself one: see `passes.trial`.

    Args:
        config: a transformers config.
        name: name that the user gave the model.

    Raises:
        InputError: the model has an encoder and a decoder, or the library knows it as neither.
    """
    family = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"model {name} ({family}) has an encoder and a decoder, each with layers of its own; "
            "give a model that is only one of them"
        )
    is_masked = family in _auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_masked and not getattr(config, "is_decoder", False):
        return ENCODER
    if family in _auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return DECODER
    if family in _auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        return DECODER
    raise InputError(
        f"model {name} ({family}) is no text model that transformers knows: expected a causal "
        "language model (GPT, Llama, …), one that also sees or hears (LLaVA, …), or an encoder "
        "trained on masked tokens (BERT, …)"
    )


def settled(config: Any) -> Any:
    """Settle what a family would change in a model while it runs; changes and returns the config.

    RWKV would halve its stream and divide its weights every few blocks, against overflow in
    float16; without, it computes the same numbers but for that factor.
    """
    if config.model_type == "rwkv":
        config.rescale_every = 0
    return config


def auto_class(config: Any, kind: str) -> Any:
    """Auto class of transformers that loads models of this kind and config."""
    if kind == ENCODER:
        return transformers.AutoModel
    if config.model_type in _auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForMultimodalLM


def construction(config: Any, kind: str) -> dict[str, Any]:
    """Keyword arguments for the constructor of a model of this kind.

    Encoders are built without the pooler: no layer depends on it, and checkpoints of masked
    language models lack it.
    """
    if kind == ENCODER:
        found = _auto.MODEL_MAPPING[type(config)]
        first = found[0] if isinstance(found, tuple | list) else found
        if "add_pooling_layer" in inspect.signature(first).parameters:
            return {"add_pooling_layer": False}
    return {}


def max_context_length(model: Any) -> int | None:
    """Largest number of positions of a sequence; None where there is no limit."""
    config = model.config.get_text_config()
    if getattr(config, "alibi", False):  # Falcon's config has a length even where none applies
        return None
    given = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    length = next((value for value in given if value is not None), None)
    if length is None or length < 1:  # XLNet says -1
        return None
    for name, module in model.base_model.named_modules():
        # RoBERTa and its kin count positions from the one after the padding's.
        if (
            name.rpartition(".")[2] == "position_embeddings"
            and isinstance(module, nn.Embedding)
            and module.num_embeddings == length
            and module.padding_idx is not None
        ):
            return int(length) - module.padding_idx - 1
    return int(length)
