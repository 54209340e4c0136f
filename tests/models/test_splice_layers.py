"""Several layers spliced in one run: each is given what those before it leave."""

from typing import Any

import pytest
import torch

from mlsae.models import Transformer
from mlsae.models.inputs import Inputs
from mlsae.models.sites import anatomies
from mlsae.models.splice import run, spliced, spliced_layers

LAYERS = (2, 0, 1)


@pytest.fixture
def where() -> torch.Tensor:
    return torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.6


def _isolated(tokens: torch.Tensor) -> Inputs:
    return Inputs(tokens=tokens, documents=torch.arange(20).expand(3, 20) // 7)


@pytest.mark.parametrize("isolated", [False, True], ids=["whole", "isolated"])
def test_the_exact_activations_give_identical_logits_at_every_site_of_every_family(
    any_family: Transformer, tokens: torch.Tensor, where: torch.Tensor, *, isolated: bool
) -> None:
    if any_family.kind == "encoder":
        return
    inputs = _isolated(tokens) if isolated else Inputs(tokens=tokens)
    logits = run(any_family, inputs)
    for site in anatomies(any_family)[1].taps:
        found = spliced_layers(any_family, inputs, LAYERS, where, lambda _layer, x: x, site)
        assert torch.equal(found, logits), site


def test_each_layer_is_given_what_the_layers_before_it_leave(
    transformer: Transformer, tokens: torch.Tensor, where: torch.Tensor
) -> None:
    """Equal to plain hooks on the blocks."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        x = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        x[where] = 0.5 * x[where].flip(-1)
        return x if isinstance(output, torch.Tensor) else (x, *output[1:])

    handles = [transformer.blocks[layer].register_forward_hook(hook) for layer in LAYERS]
    with torch.no_grad():
        expected = transformer.model(input_ids=tokens).logits
    for handle in handles:
        handle.remove()
    inputs = Inputs(tokens=tokens)
    found = spliced_layers(transformer, inputs, LAYERS, where, lambda _n, x: 0.5 * x.flip(-1))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("isolated", [False, True], ids=["whole", "isolated"])
def test_one_layer_alone_is_as_spliced_by_itself(
    transformer: Transformer, tokens: torch.Tensor, where: torch.Tensor, *, isolated: bool
) -> None:
    """And the rows that were not chosen are kept, also where documents are run by themselves."""
    inputs = _isolated(tokens) if isolated else Inputs(tokens=tokens)
    expected = spliced(
        transformer, inputs, 1, lambda x: torch.where(where[..., None], x.square(), x)
    )
    found = spliced_layers(transformer, inputs, [1], where, lambda _layer, x: x.square())
    assert torch.equal(found, expected)
    assert not torch.equal(found, run(transformer, inputs))


def test_another_shape_is_refused_and_no_hook_stays(
    transformer: Transformer, tokens: torch.Tensor, where: torch.Tensor
) -> None:
    before = [len(block._forward_hooks) for block in transformer.blocks]
    inputs = Inputs(tokens=tokens)
    with pytest.raises(ValueError, match=rf"keep the shape \({int(where.sum())}, 32\), got \(1, "):
        spliced_layers(transformer, inputs, LAYERS, where, lambda _layer, x: x[:1])
    spliced_layers(transformer, inputs, LAYERS, where, lambda _layer, x: x)
    assert [len(block._forward_hooks) for block in transformer.blocks] == before
