"""Captured activations are the blocks' outputs, and nothing is run that is not asked for."""

import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.models import Transformer
from mlsae.models.capture import capture
from mlsae.models.inputs import Inputs


def test_inner_layers_are_the_hidden_states_that_the_library_returns(
    transformer: Transformer, tokens: torch.Tensor
) -> None:
    with torch.no_grad():
        expected = transformer.model(input_ids=tokens, output_hidden_states=True).hidden_states
    captured = capture(transformer, Inputs(tokens=tokens), range(transformer.num_layers))
    assert list(captured) == [("resid_post", layer) for layer in range(4)]
    for layer in range(transformer.num_layers - 1):
        same = captured["resid_post", layer], expected[layer + 1]
        torch.testing.assert_close(*same, rtol=0, atol=0)


def test_last_layer_is_before_the_final_norm(
    transformer: Transformer, tokens: torch.Tensor
) -> None:
    """Final norm and head on the last layer's activation give the model's logits."""
    last = transformer.num_layers - 1
    x = capture(transformer, Inputs(tokens=tokens), [last])["resid_post", last]
    backbone = transformer.backbone
    norms = ("final_layer_norm", "ln_f", "norm")
    norm = next(getattr(backbone, name) for name in norms if hasattr(backbone, name))
    with torch.no_grad():
        logits = transformer.model.get_output_embeddings()(norm(x))
        expected = transformer.model(input_ids=tokens).logits
        hidden = transformer.model(input_ids=tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert not torch.equal(x, hidden[-1])


def test_each_block_maps_one_capture_to_the_next(make_model_directory, tokens) -> None:  # type: ignore[no-untyped-def]
    """In float64, GPT-2's block arithmetic written out gives layer i+1 from layer i."""
    from mlsae.models import load

    transformer = load(make_model_directory("gpt2"))
    transformer.model.double()
    captured = capture(transformer, Inputs(tokens=tokens), [0, 1])
    block = transformer.blocks[1]
    state = {name: p.detach().numpy() for name, p in block.named_parameters()}
    expected = _gpt2_block(captured["resid_post", 0].numpy(), state, num_heads=4)
    torch.testing.assert_close(
        captured["resid_post", 1], torch.from_numpy(expected), rtol=1e-9, atol=1e-9
    )


def _gpt2_block(x, p, num_heads):  # type: ignore[no-untyped-def]
    import numpy as np

    def norm(v, name):  # type: ignore[no-untyped-def]
        centred = v - v.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(v, name):  # type: ignore[no-untyped-def]
        return v @ p[f"{name}.weight"] + p[f"{name}.bias"]

    out = np.empty_like(x)
    size = x.shape[-1] // num_heads
    for b in range(len(x)):
        q, k, v = np.split(linear(norm(x[b], "ln_1"), "attn.c_attn"), 3, axis=-1)
        mixed = np.empty_like(x[b])
        for h in range(num_heads):
            part = slice(h * size, (h + 1) * size)
            for t in range(len(mixed)):
                scores = q[t, part] @ k[: t + 1, part].T / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                mixed[t, part] = weights / weights.sum() @ v[: t + 1, part]
        y = x[b] + linear(mixed, "attn.c_proj")
        u = linear(norm(y, "ln_2"), "mlp.c_fc")
        gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        out[b] = y + linear(gelu, "mlp.c_proj")
    return out


@pytest.mark.parametrize(
    ("sites", "last_begun", "last_ended"),
    [
        (("resid_post",), 1, 1),
        (("resid_pre",), 0, 0),
        (("attn_out",), 1, 0),
        (("resid_pre", "resid_post"), 1, 1),
    ],
)
def test_stops_where_the_last_tensor_asked_for_is_known(
    transformer: Transformer,
    tokens: torch.Tensor,
    sites: tuple[str, ...],
    last_begun: int,
    last_ended: int,
) -> None:
    """No later block runs; for what is known inside a block, not even the rest of that block."""
    inputs = Inputs(tokens=tokens)
    capture(transformer, inputs, [0], sites)  # The first use runs every block once, to know it.
    begun: list[int] = []
    ended: list[int] = []
    handles = []
    for layer, block in enumerate(transformer.blocks):
        inside = next(module for name, module in block.named_modules() if name)
        handles.append(inside.register_forward_hook(lambda *_, n=layer: begun.append(n)))
        handles.append(block.register_forward_hook(lambda *_, n=layer: ended.append(n)))
    captured = capture(transformer, inputs, [1, 0], sites)
    for handle in handles:
        handle.remove()
    assert list(captured) == [(site, layer) for site in sites for layer in (0, 1)]
    assert begun == list(range(last_begun + 1))
    assert ended == list(range(last_ended + 1))


def test_several_sites_cost_one_pass(transformer: Transformer, tokens: torch.Tensor) -> None:
    inputs, sites = Inputs(tokens=tokens), ("attn_out", "resid_pre", "mlp_out")
    each = {
        key: x for site in sites for key, x in capture(transformer, inputs, [2, 0], [site]).items()
    }
    passes: list[int] = []
    handle = transformer.backbone.register_forward_pre_hook(lambda *_: passes.append(1))
    together = capture(transformer, inputs, [2, 0], sites)
    handle.remove()
    assert passes == [1]
    assert list(together) == [
        (site, layer) for site in ("resid_pre", "attn_out", "mlp_out") for layer in (0, 2)
    ]
    assert all(torch.equal(x, each[key]) for key, x in together.items())


def test_leaves_no_hook_and_no_gradient_behind(
    transformer: Transformer, tokens: torch.Tensor
) -> None:
    def hooks() -> int:
        modules = list(transformer.model.modules())
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before = hooks()
    captured = capture(transformer, Inputs(tokens=tokens), [2], ["resid_post", "mlp_out"])
    assert not captured["resid_post", 2].requires_grad
    assert hooks() == before


@pytest.mark.parametrize("layers", [[4], [0, -1]])
def test_refuses_an_absent_layer_and_names_those_there(
    transformer: Transformer, tokens: torch.Tensor, layers: list[int]
) -> None:
    with pytest.raises(InputError, match=r"has no layer -?\d: its layers are 0 to 3"):
        capture(transformer, Inputs(tokens=tokens), layers)


@pytest.mark.parametrize("layers", [[], [1, 1]])
def test_refuses_no_layers_and_repeated_layers(
    transformer: Transformer, tokens: torch.Tensor, layers: list[int]
) -> None:
    with pytest.raises(InputError, match="expected one or more different layers"):
        capture(transformer, Inputs(tokens=tokens), layers)
