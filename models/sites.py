"""Sites of a transformer: those it has, and their places in each block."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlsae.base.errors import InputError
from mlsae.base.words import SITES
from mlsae.models.inputs import Inputs
from mlsae.models.passes.forward import forward, pass_explained
from mlsae.models.structure.anatomy import Anatomy, Tap, dissect
from mlsae.models.structure.blocks import hidden_of, with_hidden
from mlsae.models.structure.calls import Call, Side, noted
from mlsae.models.transformer import Transformer

_anatomies: WeakKeyDictionary[Transformer, list[Anatomy]] = WeakKeyDictionary()


def check_sites(transformer: Transformer, sites: Sequence[str]) -> tuple[str, ...]:
    """Check the sites asked for and return them in the order of `SITES`.

    For a model without weights (`outline`) only the names can be checked.

    Raises:
        InputError: none, one twice, an unknown one, or one that a block of the model does not have.
    """
    for site in sites:
        if site not in SITES:
            raise InputError(f"there is no site {site!r}: the sites are {', '.join(SITES)}")
    if not sites or len(set(sites)) != len(sites):
        raise InputError(f"expected one or more different sites, got {list(sites)}")
    if transformer.device.type != "meta":
        for layer, anatomy in enumerate(anatomies(transformer)):
            for site in sites:
                if site not in anatomy.taps:
                    raise InputError(_absent(transformer, site, layer, anatomy))
    return tuple(site for site in SITES if site in sites)


@torch.no_grad()
def anatomies(transformer: Transformer) -> list[Anatomy]:
    """Anatomy of each block, found once for a model by passing a few random tokens through it.

    Raises:
        InputError: a module among the blocks is no block, the stream is not in the order
            (sequences, positions, channels), or what leaves a block is not what enters the next.
    """
    if transformer not in _anatomies:
        length = min(7, transformer.max_context_length or 7)
        calls = _noted_calls(transformer, length)
        # Some families fill sequences up to a multiple of a length of their own.
        shape = calls[0][""].shape if "" in calls[0] else None
        if shape and len(shape) == 3 and shape[1] > length and shape[2] == transformer.d_model:
            length = shape[1]
            calls = _noted_calls(transformer, length)
        _check_blocks(transformer, calls, length)
        _anatomies[transformer] = [dissect(each) for each in calls]
    return _anatomies[transformer]


def _noted_calls(transformer: Transformer, length: int) -> list[dict[str, Call]]:
    generator = torch.Generator().manual_seed(0)
    size = (_num_sequences(length), length)
    tokens_BT = torch.randint(0, transformer.vocab_size, size, generator=generator)
    with ExitStack() as stack:
        calls = [
            stack.enter_context(noted(block, tokens_BT.numel(), transformer.d_model))
            for block in transformer.blocks
        ]
        with pass_explained(transformer, length):
            forward(transformer, transformer.backbone, Inputs(tokens=tokens_BT))
    return calls


def _num_sequences(length: int) -> int:
    """Other than the number of positions, which would hide their order."""
    return 3 if length == 2 else 2


def _check_blocks(
    transformer: Transformer, calls: Sequence[Mapping[str, Call]], length: int
) -> None:
    """Refuse blocks that are not passed one stream (B, T, d), from each to the next."""
    expected = (_num_sequences(length), length, transformer.d_model)
    before: Side | None = None
    for layer, each in enumerate(calls):
        call, kind = each.get(""), type(transformer.blocks[layer]).__name__
        name = f"{transformer.blocks_path}.{layer} of model {transformer.name}"
        if call is None and any("" in other for other in calls):
            raise InputError(
                f"{name} ({kind}) does not run once in a forward pass on text alone, as blocks do: "
                "some wait for an image, others serve several layers; such a model is not supported"
            )
        if call is not None and call.shape is not None and call.shape != expected:
            raise InputError(
                f"{name} ({kind}) returns a tensor {call.shape}, expected the residual stream in "
                f"the order (sequences, positions, d_model) {expected}; such a model is not "
                "supported"
            )
        if call is None or call.entered is None or call.left is None:
            raise InputError(
                f"{name} is no block: expected a module that runs once in a forward pass, is given "
                f"the residual stream (d_model {transformer.d_model}) and returns it; name the "
                "list that holds the blocks with --blocks PATH"
            )
        if before is not None and not same(before.value, call.entered.value):
            raise InputError(broken_chain(transformer, layer))
        before = call.left


def broken_chain(transformer: Transformer, layer: int) -> str:
    """Line for a block that is given something else than what left the block before."""
    path = transformer.blocks_path
    return (
        f"{path} of model {transformer.name} are no blocks that pass one residual stream: what "
        f"leaves {path}.{layer - 1} is not what enters {path}.{layer}; if another list holds the "
        "blocks, name it with --blocks PATH"
    )


def same(a: Tensor, b: Tensor) -> bool:
    """True for equal bits; NaN equals NaN."""
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def attach(block: nn.Module, tap: Tap, act: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call `act` with the tensor that passes a tap, and put a tensor that it returns in its place.

    The tensor is the model's own, or a copy where the model is going to write into it.
    """
    module, argument = block.get_submodule(tap.module), tap.argument

    def acted(live: Tensor) -> Tensor | None:
        new = act(live.clone() if tap.overwritten else live)
        return None if new is None else new.clone() if tap.overwritten else new

    def before(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        new = acted(given[argument])
        if new is None:
            return None
        given[argument] = new
        return tuple(given[i] for i in range(len(args))), {key: given[key] for key in kwargs}

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = acted(hidden_of(output))
        return None if new is None else with_hidden(output, new)

    if argument is None:
        return module.register_forward_hook(after)
    return module.register_forward_pre_hook(before, with_kwargs=True)


def _absent(transformer: Transformer, site: str, layer: int, anatomy: Anatomy) -> str:
    has = ", ".join(name for name in SITES if name in anatomy.taps)
    if anatomy.form == "parallel":
        why = f"in block {layer} attention and MLP both read resid_pre (a parallel residual)"
    else:
        kind = type(transformer.blocks[layer]).__name__
        why = (
            f"in block {layer} ({kind}) no sum of resid_pre and what its modules give is "
            "resid_post, so what attention and MLP add cannot be told"
        )
    return f"model {transformer.name} has no {site}: {why}; its sites are {has}"
