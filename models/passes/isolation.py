"""Proof, once for a model, that tokens do not attend to padding; isolated documents rest on it."""

from weakref import WeakKeyDictionary

import torch

from mlsae.base.errors import InputError
from mlsae.models.inputs import Inputs
from mlsae.models.passes.forward import forward
from mlsae.models.structure.blocks import hidden_of
from mlsae.models.transformer import Transformer

_unseen: WeakKeyDictionary[Transformer, bool] = WeakKeyDictionary()


def check_isolation(transformer: Transformer, inputs: Inputs) -> None:
    """Prove, if `inputs` need it, that a padded sequence gives the same outputs as alone.

    A short sequence is run alone and, padded, beside a longer one, and the outputs of the last
    block are compared.

    Raises:
        InputError: the outputs differ by more than rounding.
    """
    if inputs.documents is None and inputs.padding is None:
        return
    if transformer not in _unseen:
        _unseen[transformer] = _padding_is_unseen(transformer)
    if not _unseen[transformer]:
        raise InputError(
            f"model {transformer.name} does not keep padding out of its attention: a sequence "
            "padded beside a longer one gives other activations than alone; harvest it from "
            "concatenated text, without --isolate-documents"
        )


@torch.no_grad()
def _padding_is_unseen(transformer: Transformer) -> bool:
    # Mostly padding, so that attention to it would show.
    length = min(32, transformer.max_context_length or 32)
    short = -(-length // 8)
    generator = torch.Generator().manual_seed(0)
    tokens_NL = torch.randint(0, transformer.vocab_size, (2, length), generator=generator)
    padding_NL = torch.zeros(2, length, dtype=torch.bool)
    padding_NL[1, short:] = True
    padded = _last_output(transformer, Inputs(tokens=tokens_NL, padding=padding_NL))[1, :short]
    alone_inputs = Inputs(tokens=tokens_NL[1:, :short], first_token=length)
    alone = _last_output(transformer, alone_inputs)[0]
    errors = (padded - alone).norm(dim=-1) / alone.norm(dim=-1)
    # The shape of a batch moves last digits, and in a mixture of experts it may send one token to
    # another expert; attention to padding moves the first digits of every token. Outputs that are
    # not finite prove nothing here and are refused elsewhere.
    return not bool(errors.median() > torch.finfo(transformer.dtype).eps ** 0.5)


def _last_output(transformer: Transformer, inputs: Inputs) -> torch.Tensor:
    outputs: list[torch.Tensor] = []
    handle = transformer.blocks[-1].register_forward_hook(
        lambda _module, _args, output: outputs.append(hidden_of(output).double())
    )
    try:
        forward(transformer, transformer.backbone, inputs)
    finally:
        handle.remove()
    return outputs[0]
