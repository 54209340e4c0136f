"""Sites of a transformer: those it has, and their places in each block."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlsae.base.errors import InputError
from mlsae.base.words import SITES
from mlsae.models.inputs import Inputs
from mlsae.models.passes.forward import forward
from mlsae.models.structure.anatomy import Anatomy, Tap, dissect
from mlsae.models.structure.blocks import hidden_of, with_hidden
from mlsae.models.structure.calls import noted
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
        InputError: a module among the blocks is no block.
    """
    if transformer not in _anatomies:
        length = min(7, transformer.max_context_length or 7)
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(0, transformer.vocab_size, (2, length), generator=generator)
        with ExitStack() as stack:
            calls = [
                stack.enter_context(noted(block, tokens_BT.numel(), transformer.d_model))
                for block in transformer.blocks
            ]
            forward(transformer, transformer.backbone, Inputs(tokens=tokens_BT))
        for layer, each in enumerate(calls):
            if "" not in each or each[""].entered is None or each[""].left is None:
                raise InputError(
                    f"{transformer.blocks_path}.{layer} of model {transformer.name} is no block: "
                    "expected a module that runs once in a forward pass, is given the residual "
                    f"stream (d_model {transformer.d_model}) and returns it; name the list that "
                    "holds the blocks with --blocks PATH"
                )
        _anatomies[transformer] = [dissect(each) for each in calls]
    return _anatomies[transformer]


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
