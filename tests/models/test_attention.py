"""Attention by blocks of queries is attention, and is used where it pays alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mlsae.models import load
from mlsae.models.capture import capture
from mlsae.models.families import attention as module
from mlsae.models.families.attention import BlockedAttention
from mlsae.models.inputs import Inputs


def normal(*shape: int, seed: int) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(torch.bfloat16)


def tensors(
    num_sequences: int = 3, num_heads: int = 4, length: int = 300, num_keys: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of 32 channels, values of 48, in the layout that models have them."""
    heads = num_keys or num_heads
    query = normal(num_sequences, length, num_heads, 32, seed=0).transpose(1, 2)
    key = normal(num_sequences, length, heads, 32, seed=1).transpose(1, 2)
    return query, key, normal(num_sequences, length, heads, 48, seed=2).transpose(1, 2)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """By its formula, in float64: softmax(q kᵀ · scale, of keys up to the query) v."""
    scores = query.double() @ key.double().transpose(2, 3) * scale
    return scores.masked_fill(later(scores.shape[3]), -torch.inf).softmax(dim=3) @ value.double()


def later(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_heads", [1, 4, 20])
@pytest.mark.parametrize("length", [256, 300, 512, 1100])
@pytest.mark.parametrize("scale", [None, 0.3])
@torch.inference_mode()
def test_blocks_give_attention(num_heads: int, length: int, scale: float | None) -> None:
    """Of any number of heads and positions; nearer to float64 than `eager` in transformers."""
    q, k, v = tensors(num_heads=num_heads, length=length)
    with BlockedAttention():
        found = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    expected = exact(q, k, v, scale or 32**-0.5)
    as_ever = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    assert not torch.equal(found, as_ever)
    eager = (q @ k.transpose(2, 3) * (scale or 32**-0.5)).masked_fill(later(length), -torch.inf)
    eager = eager.softmax(dim=3, dtype=torch.float32).to(torch.bfloat16) @ v
    assert error(found, expected) < error(eager, expected)
    assert error(found, expected) < 0.01


@torch.inference_mode()
def test_heads_may_share_keys() -> None:
    """As in grouped-query attention."""
    q, k, v = tensors(num_heads=6, num_keys=2)
    with BlockedAttention():
        found = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        apart = [x.repeat_interleave(3, dim=1) for x in (k, v)]
        assert torch.equal(found, scaled_dot_product_attention(q, *apart, is_causal=True))


@torch.inference_mode()
def test_no_query_sees_a_later_key() -> None:
    """Whatever stands there."""
    q, k, v = tensors()
    with BlockedAttention():
        before = scaled_dot_product_attention(q, k, v, is_causal=True)
        k[:, :, 200:], v[:, :, 200:] = 1e30, 1e4
        after = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before[:, :, 200:], after[:, :, 200:])


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({}, 255),
        ({"is_causal": False}, 300),
        ({"is_causal": False, "attn_mask": torch.ones(300, 300, dtype=torch.bool).tril()}, 300),
        ({"dropout_p": 1.0}, 300),
        ({"dtype": torch.float32}, 300),
        ({"keys": 299}, 300),
    ],
    ids=["short", "not causal", "mask", "dropout", "float32", "fewer keys"],
)
@torch.inference_mode()
def test_what_does_not_pay_is_torchs_own(change: dict[str, Any], length: int) -> None:
    """To the last bit."""
    change = dict(change)
    dtype, keys = change.pop("dtype", torch.bfloat16), change.pop("keys", length)
    q, k, v = (x.to(dtype) for x in tensors(length=length))
    arguments = {"is_causal": True, **change}
    expected = scaled_dot_product_attention(q, k[:, :, :keys], v[:, :, :keys], **arguments)
    with BlockedAttention():
        found = scaled_dot_product_attention(q, k[:, :, :keys], v[:, :, :keys], **arguments)
    assert torch.equal(found, expected)


FAMILIES: dict[str, tuple[Any, dict[str, int], int]] = {
    "rotary": (transformers.GPTNeoXConfig, {}, 2),
    "shared keys": (transformers.LlamaConfig, {"num_key_value_heads": 2}, 2),
    "sliding window": (
        transformers.MistralConfig,
        {"sliding_window": 100, "num_key_value_heads": 2},
        0,
    ),
}
"""Config class, settings, and how often a pass of two layers computes attention in blocks."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_in_bfloat16_on_a_cpu_uses_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a layer, if nothing is masked; and it is as near to float32 as without."""
    config_class, settings, times = FAMILIES[family]
    config = config_class(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=512,
        initializer_range=0.2,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    inputs = Inputs(
        tokens=torch.randint(0, 64, (2, 300), generator=torch.Generator().manual_seed(1))
    )
    calls: list[int] = []
    in_blocks = module._in_blocks
    monkeypatch.setattr(module, "_in_blocks", lambda *a, **k: calls.append(1) or in_blocks(*a, **k))
    monkeypatch.setattr(module, "has_matrix_units", lambda: False)

    def captured(dtype: str, *, fast: bool) -> Tensor:
        monkeypatch.setattr(module, "has_fast_bfloat16", lambda: fast)
        return capture(load(tmp_path, dtype=dtype), inputs, [1])["resid_post", 1].float()

    exactly = captured("float32", fast=True)
    ever = captured("bfloat16", fast=False)
    assert calls == []
    now = captured("bfloat16", fast=True)
    assert len(calls) == times
    assert (now - exactly).norm() <= 1.1 * (ever - exactly).norm()


def test_processors_with_matrix_units_have_a_faster_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And others than CPUs have their own."""
    cpu, bfloat16 = torch.device("cpu"), torch.bfloat16
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(module, "has_matrix_units", lambda: False)
    assert module.blocks_pay(cpu, bfloat16)
    assert not module.blocks_pay(cpu, torch.float32)
    assert not module.blocks_pay(torch.device("cuda"), bfloat16)
    monkeypatch.setattr(module, "has_matrix_units", lambda: True)
    assert not module.blocks_pay(cpu, bfloat16)
