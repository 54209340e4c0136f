"""Control of Heap et al., arXiv 2501.17727: token embeddings replaced by noise at run time.

Each token of the packed text gets a vector of its own, so that equal tokens have nothing in common.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.base.errors import InputError
from mlsae.models.inputs import Inputs
from mlsae.models.transformer import Transformer
from mlsae.models.weights.initialization import philox

# Tokens that share a stream; to start one costs as much as to draw a hundred of its numbers.
_GROUP = 64


def control_rows(
    seed: int, indices_N: npt.NDArray[np.int64], width: int
) -> npt.NDArray[np.float32]:
    """Draw the vectors that stand for tokens, independent N(0, 1) in every component.

    Args:
        seed: seed of the whole text.
        indices_N: index of each token in the packed text, from 0, in any order.
        width: components of a vector.

    Returns:
        (N, width) float32; a row is a function of `seed`, its index and `width` alone.
    """
    order_N = np.argsort(indices_N, kind="stable")
    groups_N = indices_N[order_N] // _GROUP
    groups, starts = np.unique(groups_N, return_index=True)
    rows_Nw = np.empty((len(indices_N), width), np.float32)
    for group, chosen in zip(groups, np.split(order_N, starts[1:]), strict=True):
        generator = np.random.Generator(philox("control", seed, int(group)))
        drawn = generator.standard_normal((_GROUP, width), dtype=np.float32)
        rows_Nw[chosen] = drawn[indices_N[chosen] % _GROUP]
    return rows_Nw


@contextmanager
def control_embeddings(transformer: Transformer, inputs: Inputs) -> Iterator[None]:
    """Replace token embeddings by `control_rows` in forward passes on `inputs` inside the block.

    The output of the input-embedding module is replaced, in its dtype on its device; position
    embeddings and later steps of the model stay. For any `init` but `control`, nothing is done.

    Raises:
        InputError: the module is called with another shape, so that tokens cannot be told apart.
    """
    if transformer.init != "control":
        yield
        return

    def replace(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[:-1] != inputs.tokens.shape:
            raise InputError(
                f"--init control is not possible with model {transformer.name}: its embedding "
                f"returns {tuple(output.shape)} for tokens {tuple(inputs.tokens.shape)}"
            )
        indices = inputs.token_indices().reshape(-1).numpy()
        rows = control_rows(transformer.init_seed, indices, output.shape[-1])
        return torch.from_numpy(rows).view(output.shape).to(output)

    handle = transformer.model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
