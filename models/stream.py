"""Proof that a pass has one residual stream: what leaves a block is what enters the next.

B = sequences, T = positions, d = d_model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mlsae.base.errors import InputError
from mlsae.models.passes.forward import pass_explained
from mlsae.models.sites import anatomies, attach, broken_chain, same
from mlsae.models.transformer import Transformer

_proven: WeakKeyDictionary[Transformer, set[tuple[int, int]]] = WeakKeyDictionary()


@contextmanager
def stream_proven(transformer: Transformer, shape: torch.Size, last: int) -> Iterator[None]:
    """Prove it for the pass inside, up to a block, if it is the first of its length.

    Args:
        transformer: the model.
        shape: (B, T) of the tokens.
        last: the last block whose input is looked at.

    Raises:
        InputError: the stream has another shape than (B, T, d), as where a model fills sequences
            up to a length of its own; a block is given something else than what left the block
            before; or the model cannot be run on sequences of this length.
    """
    proven = _proven.setdefault(transformer, set())
    kind = (shape[1], last)
    if kind in proven:
        yield
        return
    left: list[Tensor] = []

    def enters(layer: int, x: Tensor) -> None:
        _check_shape(transformer, layer, x, shape)
        if left and not same(left.pop().to(x.device), x):
            raise InputError(broken_chain(transformer, layer))

    def leaves(layer: int, x: Tensor) -> None:
        _check_shape(transformer, layer, x, shape)
        # A copy, because the model may write into it before the next block.
        left[:] = [x.clone()] if layer < last else []

    with ExitStack() as stack:
        for layer, anatomy in enumerate(anatomies(transformer)[: last + 1]):
            for site, act in (("resid_pre", enters), ("resid_post", leaves)):
                handle = attach(transformer.blocks[layer], anatomy.taps[site], partial(act, layer))
                stack.callback(handle.remove)
        stack.enter_context(pass_explained(transformer, shape[1], trial=False))
        yield
    proven.add(kind)


def _check_shape(transformer: Transformer, layer: int, x: Tensor, shape: torch.Size) -> None:
    expected = (*shape, transformer.d_model)
    if tuple(x.shape) != expected:
        longer = x.shape[1] if x.ndim == 3 and x.shape[1] > shape[1] else None
        cure = "such a model is not supported"
        if longer is not None:
            cure = (
                f"the model fills sequences up to {longer}: use --context-length {longer}, without "
                "--isolate-documents"
            )
        raise InputError(
            f"the residual stream at {transformer.blocks_path}.{layer} of model {transformer.name} "
            f"is {tuple(x.shape)}, expected {expected}; {cure}"
        )
