"""A trial of a decoder on a few tokens: does it look ahead, and needs it its cache.

B = sequences, T = positions, d = d_model.
"""

import warnings

import torch
import transformers
from torch import Tensor

from mlsae.base.errors import InputError
from mlsae.models.inputs import Inputs
from mlsae.models.passes.forward import forward, pass_explained
from mlsae.models.structure.blocks import hidden_of
from mlsae.models.transformer import Transformer

_LENGTH = 12


@torch.no_grad()
def looks_ahead(transformer: Transformer) -> bool:
    """True for a model whose outputs depend on later tokens, whatever its class is called.

    The second half of a sequence is replaced, and the outputs at the first half are compared. The
    number of tokens of each expert may move last digits there: by how much, a change of the other
    sequence tells.

    Raises:
        InputError: the model cannot be run, computes other values without its cache, or should
            look ahead by its config and does not.
    """
    length = min(_LENGTH, transformer.max_context_length or _LENGTH)
    half = length // 2
    generator = torch.Generator().manual_seed(0)
    size = (2, length)
    tokens_BT, others_BT = (
        torch.randint(0, transformer.vocab_size, size, generator=generator) for _ in range(2)
    )
    inputs = Inputs(tokens=tokens_BT)
    first = _last_output(transformer, inputs)
    if first.ndim != 3 or first.shape[0] != 2 or first.shape[1] < length:
        return False  # no stream in the order of tokens; refused where it is captured
    _check_cache(transformer, inputs, first)

    def change(where_BT: Tensor) -> float:
        changed = Inputs(
            tokens=tokens_BT.where(~where_BT, others_BT),
            # Noise in place of embeddings is another for another index.
            indices=inputs.token_indices() + 2 * length * where_BT,
        )
        return _median_change(first[0, :half], _last_output(transformer, changed)[0, :half])

    later_BT, beside_BT = torch.zeros(2, *size, dtype=torch.bool)
    later_BT[0, half:], beside_BT[1] = True, True
    moved = change(later_BT)
    ahead = moved > 4 * torch.finfo(transformer.dtype).eps and moved > 10 * change(beside_BT)
    config = transformer.model.config
    if not ahead and getattr(config.get_text_config(), "is_causal", True) is False:
        raise InputError(
            f"the config of model {transformer.name} says is_causal: false, but transformers "
            f"{transformers.__version__} computes models of type {config.model_type} causally; "
            "install a newer version of transformers, or take is_causal out of config.json"
        )
    return ahead


def _check_cache(transformer: Transformer, inputs: Inputs, expected_BTd: Tensor) -> None:
    """Refuse a model that computes other values without its cache than with it."""
    try:
        cached = _last_output(transformer, inputs, use_cache=True)
    except InputError:
        return  # no cache to be used
    if _median_change(expected_BTd, cached) > torch.finfo(transformer.dtype).eps ** 0.5:
        raise InputError(
            f"model {transformer.name} computes other values without its key-value cache than with "
            f"it: a defect of transformers {transformers.__version__} for models of type "
            f"{transformer.model.config.model_type}; install a newer version of transformers"
        )


def _median_change(before: Tensor, after: Tensor) -> float:
    """Median over tokens of the relative change; NaN, which is above nothing, where one is NaN."""
    return float(((after - before).norm(dim=-1) / before.norm(dim=-1)).median())


def _last_output(transformer: Transformer, inputs: Inputs, *, use_cache: bool = False) -> Tensor:
    """Output of the last block, in float64."""
    outputs: list[Tensor] = []
    handle = transformer.blocks[-1].register_forward_hook(
        lambda _module, _args, output: outputs.append(hidden_of(output).double())
    )
    try:
        with pass_explained(transformer, inputs.tokens.shape[1]), warnings.catch_warnings():
            # A first pass may compile kernels, of which a user need hear nothing.
            warnings.simplefilter("ignore")
            forward(transformer, transformer.backbone, inputs, use_cache=use_cache)
    finally:
        handle.remove()
    return outputs[-1] if outputs else torch.empty(0)
