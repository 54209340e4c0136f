"""Splicing changes exactly what it is given to change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.models import Transformer, load
from mlsae.models.capture import capture
from mlsae.models.inputs import Inputs
from mlsae.models.sites import anatomies
from mlsae.models.splice import run, spliced


@pytest.fixture
def inputs(tokens: torch.Tensor) -> Inputs:
    return Inputs(tokens=tokens)


@pytest.mark.parametrize("layer", range(4))
def test_exact_activation_gives_identical_logits(
    transformer: Transformer, inputs: Inputs, layer: int
) -> None:
    """Bit for bit, with the stored activation and with the live one."""
    logits = run(transformer, inputs)
    x = capture(transformer, inputs, [layer])["resid_post", layer]
    assert torch.equal(spliced(transformer, inputs, layer, lambda _: x.clone()), logits)
    assert torch.equal(spliced(transformer, inputs, layer, lambda live: live), logits)


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
    result = spliced(transformer, Inputs(tokens=tokens), layer, torch.zeros_like)
    assert torch.equal(result, expected)
    assert not torch.equal(result, run(transformer, Inputs(tokens=tokens)))


def test_replace_receives_the_live_activation(
    transformer: Transformer, tokens: torch.Tensor
) -> None:
    seen: list[torch.Tensor] = []
    spliced(transformer, Inputs(tokens=tokens), 2, lambda live: (seen.append(live), live)[1])
    assert torch.equal(seen[0], capture(transformer, Inputs(tokens=tokens), [2])["resid_post", 2])


def test_hook_is_removed_when_replace_fails(transformer: Transformer, tokens: torch.Tensor) -> None:
    before = len(transformer.blocks[1]._forward_hooks)
    with pytest.raises(ValueError, match=r"replace must keep the shape \(3, 20, 32\)"):
        spliced(transformer, Inputs(tokens=tokens), 1, lambda live: live[:, 1:])
    assert len(transformer.blocks[1]._forward_hooks) == before


@pytest.mark.parametrize("isolated", [False, True], ids=["whole", "isolated"])
def test_at_every_site_of_every_family_the_exact_activation_gives_identical_logits(
    any_family: Transformer, inputs: Inputs, *, isolated: bool
) -> None:
    """Bit for bit, also where the model adds the residual inside a module or writes in place."""
    if any_family.kind == "encoder":
        with pytest.raises(InputError, match=r"is an encoder .*: cross-entropy needs a decoder$"):
            run(any_family, inputs)
        with pytest.raises(InputError, match=r"is an encoder .*: cross-entropy needs a decoder$"):
            spliced(any_family, inputs, 0, lambda live: live)
        return
    if isolated:
        inputs = Inputs(tokens=inputs.tokens, documents=torch.arange(20).expand(3, 20) // 7)
    logits = run(any_family, inputs)
    for site in anatomies(any_family)[1].taps:
        x = capture(any_family, inputs, [1], [site])[site, 1]
        kept = x.clone()
        assert torch.equal(spliced(any_family, inputs, 1, lambda _, x=x: x, site), logits), site
        assert torch.equal(x, kept), f"{site}: the model wrote into what it was given"


@pytest.mark.parametrize("isolated", [False, True], ids=["whole", "isolated"])
def test_at_every_site_of_every_family_what_follows_is_computed_from_the_replacement(
    any_family: Transformer, inputs: Inputs, *, isolated: bool
) -> None:
    """Captured in one run with a replacement, the sites downstream satisfy the block's identity."""
    if any_family.kind == "encoder":
        return
    if isolated:
        inputs = Inputs(tokens=inputs.tokens, documents=torch.arange(20).expand(3, 20) // 7)
    anatomy = anatomies(any_family)[1]
    before = capture(any_family, inputs, [1], list(anatomy.taps))
    new = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(3))
    for site in anatomy.taps:
        logits = spliced(any_family, inputs, 1, lambda _: new, site)
        assert not torch.allclose(logits, run(any_family, inputs))
        expected = _post_with(any_family, inputs, anatomy.form, site, new, before)
        if expected is not None:
            same = spliced(any_family, inputs, 1, lambda _, post=expected: post)
            torch.testing.assert_close(logits, same, rtol=1e-4, atol=1e-4)


def test_resid_mid_is_replaced_once_where_several_modules_read_it(
    make_family: Callable[[str], Transformer], inputs: Inputs
) -> None:
    """A norm inside another module is given the same tensor as that module."""
    plain, nested = (load(make_family("Llama").name) for _ in range(2))
    for block in nested.blocks:
        block.post_attention_layernorm = torch.nn.Sequential(block.post_attention_layernorm)
    assert [len(anatomy.mid_readers) for anatomy in anatomies(nested)] == [2, 2, 2]
    given: list[torch.Tensor] = []

    def doubled(live: torch.Tensor) -> torch.Tensor:
        given.append(live)
        return 2 * live

    expected, logits = (
        spliced(model, inputs, 1, doubled, "resid_mid") for model in (plain, nested)
    )
    assert torch.equal(logits, expected)
    assert len(given) == 2
    assert torch.equal(*given)


def _post_with(
    transformer: Transformer,
    inputs: Inputs,
    form: str | None,
    site: str,
    new: torch.Tensor,
    before: dict[tuple[str, int], torch.Tensor],
) -> torch.Tensor | None:
    """`resid_post` that a replacement leads to, by the identity; None where it is not one sum."""
    pre, post, attn, mlp = (
        before[name, 1] for name in ("resid_pre", "resid_post", "attn_out", "mlp_out")
    )
    if site == "resid_post":
        return new
    if form == "parallel":
        return {"attn_out": pre + new + mlp, "mlp_out": pre + attn + new}.get(site)
    if form == "sequential":
        if site == "mlp_out":
            return before["resid_mid", 1] + new
        if site in ("resid_mid", "attn_out"):
            mid = new if site == "resid_mid" else pre + new
            return mid + _mlp_of(transformer, inputs, mid)
    assert post.shape == new.shape
    return None


def _mlp_of(transformer: Transformer, inputs: Inputs, mid: torch.Tensor) -> torch.Tensor:
    """Sum that the MLP of block 1 adds to another `resid_mid`: seen while the modules that read it,
    named in the block's anatomy, are given it. Every MLP works on tokens one by one."""
    block, anatomy = transformer.blocks[1], anatomies(transformer)[1]
    reader, mlp = anatomy.mid_readers[0], anatomy.taps["mlp_out"]
    seen: list[torch.Tensor] = []
    handles = [
        block.get_submodule(reader.module).register_forward_pre_hook(
            lambda _m, args: (mid.view_as(args[0]), *args[1:])
        ),
        block.get_submodule(mlp.module).register_forward_hook(
            lambda _m, _a, out: seen.append(out if torch.is_tensor(out) else out[0])
        ),
    ]
    with torch.no_grad():
        transformer.backbone(input_ids=inputs.tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen[0].reshape(mid.shape)
