"""Documents and padding: forward passes in which each token sees what it may attend to, no more.

Documents of about equal length share a pass, where padding provably changes nothing; in a model
that attends to padding or adapts itself to the length of a pass, only those of equal length do.
"""

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mlsae.base.errors import InputError
from mlsae.models.inputs import Inputs
from mlsae.models.passes.documents import DocumentPass, passes
from mlsae.models.passes.forward import forward, pass_explained
from mlsae.models.passes.unchanged import adapts_itself
from mlsae.models.structure.blocks import hidden_of
from mlsae.models.transformer import Transformer

_unseen: WeakKeyDictionary[Transformer, dict[int, bool]] = WeakKeyDictionary()


def separate_passes(transformer: Transformer, inputs: Inputs) -> list[DocumentPass]:
    """Divide `inputs` into forward passes; see `documents.passes`.

    Ids at padding for which the model has no embedding become 0: no token sees them.

    Raises:
        InputError: the model cannot be run on sequences of this length, or fills shorter ones up.
    """
    if inputs.documents is None and inputs.padding is None:
        return passes(inputs)
    if inputs.padding is not None:
        unknown = inputs.padding & (inputs.tokens >= transformer.vocab_size)
        inputs = replace(inputs, tokens=inputs.tokens.masked_fill(unknown, 0))
    known, length = _unseen.setdefault(transformer, {}), inputs.tokens.shape[1]
    if length not in known:
        known[length] = _padding_is_unseen(transformer, length)
    return passes(inputs, of_equal_length=not known[length])


@torch.no_grad()
def _padding_is_unseen(transformer: Transformer, length: int) -> bool:
    """Run sequences alone and padded to a length, and compare the outputs of the last block."""
    generator = torch.Generator().manual_seed(0)
    tokens_L = torch.randint(0, transformer.vocab_size, (length,), generator=generator)
    unseen = True
    # Mostly padding, so that attention to it would show; and half, which is long in a long pass.
    # Odd, so that a length to whose multiples a model fills sequences up would show.
    for short in sorted({-(-length // 8) | 1, -(-length // 2) | 1}):
        if short >= length:
            continue
        padding_L = torch.arange(length) >= short
        padded = _last_output(transformer, tokens_L, padding_L)[:short]
        alone = _last_output(transformer, tokens_L[:short], None)
        if len(alone) > short:
            raise InputError(
                f"model {transformer.name} fills sequences of {short} tokens up to {len(alone)}, "
                "so that documents cannot be run at their own lengths; harvest it from "
                "concatenated text, without --isolate-documents"
            )
        errors = (padded - alone).norm(dim=-1) / alone.norm(dim=-1)
        # The shape of a batch moves last digits, and in a mixture of experts it may send one token
        # to another expert; attention to padding moves the first digits of every token. Outputs
        # that are not finite prove nothing here and are refused elsewhere.
        unseen &= not bool(errors.median() > torch.finfo(transformer.dtype).eps ** 0.5)
    return unseen and not adapts_itself(transformer)


def _last_output(transformer: Transformer, tokens_L: Tensor, padding_L: Tensor | None) -> Tensor:
    """Output (L, d) of the last block for one sequence."""
    outputs: list[Tensor] = []
    handle = transformer.blocks[-1].register_forward_hook(
        lambda _module, _args, output: outputs.append(hidden_of(output)[0].double())
    )
    padding = None if padding_L is None else padding_L[None]
    try:
        with pass_explained(transformer, len(tokens_L), trial=False):
            forward(
                transformer, transformer.backbone, Inputs(tokens=tokens_L[None], padding=padding)
            )
    finally:
        handle.remove()
    return outputs[0]
