"""Activations at chosen sites and layers, from one pass of the backbone.

B = sequences, T = positions, d = d_model; a single pass has N sequences of L positions.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor

from mlsae.base.words import Key
from mlsae.models.inputs import Inputs
from mlsae.models.passes.documents import together
from mlsae.models.passes.forward import PassLeft, forward
from mlsae.models.passes.isolation import separate_passes
from mlsae.models.sites import anatomies, attach, check_sites
from mlsae.models.stream import stream_proven
from mlsae.models.structure.anatomy import Tap
from mlsae.models.transformer import Transformer


@torch.no_grad()
def capture(
    transformer: Transformer,
    inputs: Inputs,
    layers: Sequence[int],
    sites: Sequence[str] = ("resid_post",),
) -> dict[Key, Tensor]:
    """The activations at some sites of some layers.

    Only the backbone runs, without a key-value cache, and stops after the last of them.
    `resid_post` is a block's output, before any final norm; `attn_out` and `mlp_out` are the terms
    added to the stream.

    Args:
        transformer: the model.
        inputs: the sequences. With documents, each document is run as a sequence of its own.
        layers: block indices, in any order.
        sites: names from `SITES`, in any order.

    Returns:
        For each (site, layer), sites in the order of `SITES` and layers ascending, a tensor
        (B, T, d) in the model's dtype on the block's device. The tensor is the model's own; it is
        a copy where the model is going to write into it, and where documents were given or
        padded sequences are run one by one.

    Raises:
        InputError: a layer or site that the model does not have; or the model cannot be run on
            sequences of this length, or passes no residual stream through its blocks in it.
    """
    wanted_layers = transformer.check_layers(layers)
    wanted_sites = check_sites(transformer, sites)
    blocks = anatomies(transformer)
    taps = {
        (site, layer): blocks[layer].taps[site] for site in wanted_sites for layer in wanted_layers
    }
    parts = separate_passes(transformer, inputs)
    results = ((each, _captured(transformer, each.inputs, taps)) for each in parts)
    return together(results, inputs.tokens.shape)


def _captured(
    transformer: Transformer, inputs: Inputs, taps: Mapping[Key, Tap]
) -> dict[Key, Tensor]:
    captured: dict[Key, Tensor] = {}

    def keep(key: Key) -> Callable[[Tensor], None]:
        def act(x: Tensor) -> None:
            captured[key] = x.reshape(*inputs.tokens.shape, x.shape[-1])
            if len(captured) == len(taps):
                raise PassLeft

        return act

    last = max(layer for _, layer in taps)
    with ExitStack() as stack:
        stack.enter_context(stream_proven(transformer, inputs.tokens.shape, last))
        for key, tap in taps.items():
            handle = attach(transformer.blocks[key[1]], tap, keep(key))
            stack.callback(handle.remove)
        stack.enter_context(suppress(PassLeft))
        forward(transformer, transformer.backbone, inputs, extent=last)
    return {key: captured[key] for key in taps}
