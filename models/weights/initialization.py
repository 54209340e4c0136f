"""Weights of a transformer drawn at random, each tensor from its own stream.

The variants are from Heap et al., arXiv 2501.17727, section 3.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from mlsae.base.errors import InputError
from mlsae.base.files import canonical_json
from mlsae.base.units import check_seed

INITS = ("trained", "rerandomized", "rerandomized-keep-embeddings", "random", "control")
"""Trained weights; every tensor redrawn; every tensor redrawn but the token embeddings and the
unembedding; the initialisation of the model's own config; trained weights with token embeddings
replaced by noise at run time (see `passes.control`)."""

_REDRAWN = ("rerandomized", "rerandomized-keep-embeddings")
# Elements handled at a time, so that float64 copies stay small beside the model.
_BLOCK = 1 << 20
_MAX_THREADS = 16


def check_init(init: str, seed: int) -> None:
    """Refuse an initialisation or a seed that does not exist.

    Raises:
        InputError: `init` is none of `INITS`, or `seed` is not in 0 … 2^63 − 1.
    """
    if init not in INITS:
        raise InputError(f"--init must be one of {', '.join(INITS)}, got {init!r}")
    check_seed("--init-seed", seed)


def needs_redraw(init: str) -> bool:
    """True for an initialisation that `redraw` makes from the trained weights."""
    return init in _REDRAWN


def philox(*key: str | int) -> np.random.Philox:
    """Random stream of a key: Philox keyed by the SHA-256 of the key's JSON."""
    digest = hashlib.sha256(canonical_json(list(key))).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))


def redraw(model: nn.Module, init: str, seed: int) -> None:
    """Draw a model's parameters anew, in place, block by block.

    Each parameter, vectors and scalars included, becomes N(m, v) with m the mean and v the
    population variance of its own elements. Buffers stay. A tensor shared by several modules is
    drawn once, under the first of its names in alphabetical order. The draws depend on that name,
    `seed`, m and v alone, not on the order of the parameters, their device or the threads.

    Args:
        model: a transformers model whose weights are all in memory.
        init: an initialisation for which `needs_redraw` is true.
        seed: seed of all streams.

    Raises:
        InputError: a parameter is not of a floating-point type, as in a quantised model.
    """
    kept = _embeddings(model) if init == "rerandomized-keep-embeddings" else set()
    drawn = {name: p for name, p in _unique_parameters(model) if p.numel() and id(p) not in kept}
    for name, parameter in drawn.items():
        if not parameter.is_floating_point():
            raise InputError(
                f"--init {init} draws floating-point weights, but {name} is {parameter.dtype}: "
                "give a model that is not quantised"
            )
    generators = [np.random.Generator(philox("parameter", name, seed)) for name in drawn]
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(_redraw_tensor, drawn.values(), generators))


def _unique_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    seen: set[int] = set()
    for name, parameter in sorted(
        model.named_parameters(remove_duplicate=False), key=lambda named: named[0]
    ):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def _embeddings(model: nn.Module) -> set[int]:
    """Identities of the parameters of the token embedding and of the unembedding."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    return {id(p) for module in modules if module is not None for p in module.parameters()}


@torch.no_grad()  # holds for one thread
def _redraw_tensor(parameter: torch.Tensor, generator: np.random.Generator) -> None:
    values = parameter.detach().reshape(-1)
    blocks = torch.split(values, _BLOCK)
    mean = sum(float(_float64(block).sum()) for block in blocks) / len(values)
    square = sum(float(np.square(_float64(block) - mean).sum()) for block in blocks)
    # The last bits of a sum depend on the processor: rounded to float32, they no longer matter.
    centre, scale = float(np.float32(mean)), float(np.float32(np.sqrt(square / len(values))))
    for block in blocks:
        block.copy_(torch.from_numpy(generator.standard_normal(len(block)) * scale + centre))
    parameter.copy_(values.reshape(parameter.shape))  # where it is not contiguous, a copy was drawn


def _float64(values: torch.Tensor) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return values.to("cpu", torch.float64).numpy()
