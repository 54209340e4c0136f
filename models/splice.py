"""The live model with a site replaced, for what a reconstruction costs downstream.

B = sequences, T = positions of a sequence, d = d_model, V = vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlsae.base.errors import InputError
from mlsae.models.capture import capture
from mlsae.models.families.kinds import DECODER
from mlsae.models.inputs import Inputs
from mlsae.models.passes.documents import DocumentPass, together
from mlsae.models.passes.forward import forward
from mlsae.models.passes.isolation import separate_passes
from mlsae.models.sites import anatomies, attach, check_sites
from mlsae.models.structure.anatomy import Anatomy
from mlsae.models.transformer import Transformer

Replace = Callable[[Tensor], Tensor]


@torch.no_grad()
def run(transformer: Transformer, inputs: Inputs) -> Tensor:
    """Logits (B, T, V) of the whole model, in its dtype on its device.

    Raises:
        InputError: the model is an encoder or has no head; or the inputs have documents or padding
            and the model cannot be run on sequences of this length.
    """
    _check_predicts(transformer)
    parts = separate_passes(transformer, inputs)
    results = ((each, {"logits": _logits(transformer, each.inputs)}) for each in parts)
    return together(results, inputs.tokens.shape)["logits"]


@torch.no_grad()
def spliced(
    transformer: Transformer,
    inputs: Inputs,
    layer: int,
    replace: Replace,
    site: str = "resid_post",
) -> Tensor:
    """Logits (B, T, V) with one site of one layer replaced while the model runs.

    Everything downstream sees the replacement, the residual connection too. The exact activation
    gives the exact logits, bit for bit.

    Args:
        transformer: the model.
        inputs: the sequences.
        layer: the block.
        replace: from the live activation (B, T, d) to its replacement, of the same shape; cast to
            the model's dtype. The function is called once and must not write into its argument.
        site: name from `SITES`.

    Raises:
        InputError: as `run`; or a layer or site that the model does not have.
        ValueError: `replace` returned another shape.
    """
    _check_predicts(transformer)
    transformer.check_layers([layer])
    check_sites(transformer, [site])
    parts = separate_passes(transformer, inputs)
    block, anatomy = transformer.blocks[layer], anatomies(transformer)[layer]
    if parts[0].places is None:
        with _replaced(block, anatomy, site, _checked(replace, inputs.tokens.shape)):
            return _logits(transformer, parts[0].inputs)
    whole_BTd = capture(transformer, inputs, [layer], [site])[site, layer]
    new_BTd = _checked(replace, inputs.tokens.shape)(whole_BTd)

    def results() -> Iterator[tuple[DocumentPass, dict[str, Tensor]]]:
        for each in parts:
            with _replaced(block, anatomy, site, partial(each.take, new_BTd)):
                logits = _logits(transformer, each.inputs)
            yield each, {"logits": logits}

    return together(results(), inputs.tokens.shape)["logits"]


@torch.no_grad()
def spliced_layers(
    transformer: Transformer,
    inputs: Inputs,
    layers: Sequence[int],
    where_BT: Tensor,
    replace: Callable[[int, Tensor], Tensor],
    site: str = "resid_post",
) -> Tensor:
    """Logits (B, T, V) with one site of several layers replaced in one run of the model.

    Each layer sees the activations that flow once the layers before it have been replaced.

    Args:
        transformer: the model.
        inputs: the sequences.
        layers: the blocks, in any order.
        where_BT: bool, the tokens whose activations are replaced.
        replace: from a layer and its live activations (N, d) at some of these tokens to their
            replacements, row by row, of the same shape; cast to the model's dtype.
        site: name from `SITES`.

    Raises:
        InputError: as `spliced`.
        ValueError: `replace` returned another shape.
    """
    _check_predicts(transformer)
    wanted = transformer.check_layers(layers)
    check_sites(transformer, [site])
    parts = separate_passes(transformer, inputs)

    def results() -> Iterator[tuple[DocumentPass, dict[str, Tensor]]]:
        for each in parts:
            where = where_BT
            if each.places is not None:
                nowhere = torch.zeros_like(each.places, dtype=torch.bool).to(where_BT.device)
                where = each.take(where_BT[..., None], nowhere[..., None])[..., 0]
            with ExitStack() as stack:
                for layer in wanted:
                    new = _checked(_rows_replaced(layer, where, replace), where.shape)
                    block, anatomy = transformer.blocks[layer], anatomies(transformer)[layer]
                    stack.enter_context(_replaced(block, anatomy, site, new))
                logits = _logits(transformer, each.inputs)
            yield each, {"logits": logits}

    return together(results(), inputs.tokens.shape)["logits"]


def _rows_replaced(
    layer: int, where_BT: Tensor, replace: Callable[[int, Tensor], Tensor]
) -> Replace:
    def replaced(live_BTd: Tensor) -> Tensor:
        where = where_BT.to(live_BTd.device)
        live_Nd = live_BTd[where]
        new_Nd = replace(layer, live_Nd)
        if new_Nd.shape != live_Nd.shape:
            raise ValueError(
                f"replace must keep the shape {tuple(live_Nd.shape)}, got {tuple(new_Nd.shape)}"
            )
        new_BTd = live_BTd.clone()
        new_BTd[where] = new_Nd.to(live_BTd)
        return new_BTd

    return replaced


@contextmanager
def _replaced(block: nn.Module, anatomy: Anatomy, site: str, replace: Replace) -> Iterator[None]:
    """Replace a site of a block while the context is open."""
    if site == "resid_mid" and anatomy.form == "sequential":
        handles = _mid_replaced(block, anatomy, replace)
    else:
        handles = [attach(block, anatomy.taps[site], replace)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mid_replaced(block: nn.Module, anatomy: Anatomy, replace: Replace) -> list[RemovableHandle]:
    """Replace `resid_mid` of a sequential block, where it is a sum that no module gives.

    Every reader of that sum is given the replacement, and so is the residual connection around the
    MLP: the block's output becomes the replacement plus the MLP's new output.
    """
    new: list[Tensor] = []
    added: list[Tensor] = []

    def mid(live: Tensor) -> Tensor:
        if not new:
            new.append(replace(live))
        return new[0].reshape(live.shape)

    def post(live: Tensor) -> Tensor:
        return (new[0].reshape(live.shape) + added[0].reshape(live.shape)).to(live)

    return [
        *(attach(block, reader, mid) for reader in anatomy.mid_readers),
        attach(block, anatomy.taps["mlp_out"], added.append),
        attach(block, anatomy.taps["resid_post"], post),
    ]


def _checked(replace: Replace, shape: torch.Size) -> Replace:
    """Wrap `replace` to take (B, T, d), and hold its result to that shape and the dtype."""

    def checked(live: Tensor) -> Tensor:
        live_BTd = live.reshape(*shape, live.shape[-1])
        new_BTd = replace(live_BTd)
        if new_BTd.shape != live_BTd.shape:
            raise ValueError(
                f"replace must keep the shape {tuple(live_BTd.shape)}, got {tuple(new_BTd.shape)}"
            )
        return new_BTd.to(live).reshape(live.shape)

    return checked


def _logits(transformer: Transformer, inputs: Inputs) -> Tensor:
    return forward(transformer, transformer.model, inputs).logits  # type: ignore[no-any-return]


def _check_predicts(transformer: Transformer) -> None:
    if transformer.kind != DECODER:
        raise InputError(
            f"model {transformer.name} is an encoder and predicts no next token: cross-entropy "
            "needs a decoder"
        )
    if not transformer.predicts:
        raise InputError(
            f"model {transformer.name} is a decoder without its head and predicts no next token: "
            "cross-entropy needs the head"
        )
