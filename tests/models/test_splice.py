"""Splicing changes exactly what it is given to change."""

from typing import Any

import pytest
import torch

from mlsae.models import Transformer
from mlsae.models.capture import capture
from mlsae.models.splice import run, spliced


@pytest.mark.parametrize("layer", range(4))
def test_exact_activation_gives_identical_logits(
    transformer: Transformer, tokens: torch.Tensor, layer: int
) -> None:
    """Bit for bit, with the stored activation and with the live one."""
    logits = run(transformer, tokens)
    x = capture(transformer, tokens, [layer])[layer]
    assert torch.equal(spliced(transformer, tokens, layer, lambda _: x.clone()), logits)
    assert torch.equal(spliced(transformer, tokens, layer, lambda live: live), logits)


@pytest.mark.parametrize("layer", range(3))
def test_zeros_are_what_the_next_block_sees(
    transformer: Transformer, tokens: torch.Tensor, layer: int
) -> None:
    """Equal to a plain run in which the next block's input is set to zero."""

    def zero_input(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.zeros_like(args[0]), *args[1:])

    handle = transformer.blocks[layer + 1].register_forward_pre_hook(zero_input)
    with torch.no_grad():
        expected = transformer.model(input_ids=tokens).logits
    handle.remove()
    result = spliced(transformer, tokens, layer, torch.zeros_like)
    assert torch.equal(result, expected)
    assert not torch.equal(result, run(transformer, tokens))


def test_replace_receives_the_live_activation(
    transformer: Transformer, tokens: torch.Tensor
) -> None:
    seen: list[torch.Tensor] = []
    spliced(transformer, tokens, 2, lambda live: (seen.append(live), live)[1])
    assert torch.equal(seen[0], capture(transformer, tokens, [2])[2])


def test_hook_is_removed_when_replace_fails(transformer: Transformer, tokens: torch.Tensor) -> None:
    before = len(transformer.blocks[1]._forward_hooks)
    with pytest.raises(ValueError, match=r"replace must keep the shape \(3, 20, 32\)"):
        spliced(transformer, tokens, 1, lambda live: live[:, 1:])
    assert len(transformer.blocks[1]._forward_hooks) == before
