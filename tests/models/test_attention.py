"""Attention by blocks of queries is attention, has a name of its own, and is used where it pays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

from mlsae.base.errors import InputError
from mlsae.models import load
from mlsae.models.capture import capture
from mlsae.models.families import attention as module
from mlsae.models.families.attention import BY_BLOCKS, register
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


def computed(name: str, *tensors: Tensor, **settings: Any) -> Tensor:
    """Attention (B, H, T, d) as a module of a decoder asks transformers for it, by name."""
    register()
    attending = nn.Module()
    attending.num_key_value_groups = tensors[0].shape[1] // tensors[1].shape[1]
    arguments = {"attention_mask": None, "is_causal": True, **settings}
    found, _ = AttentionInterface()[name](attending, *tensors, **arguments)
    assert found.is_contiguous()
    return found.transpose(1, 2)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("num_sequences", "num_heads", "length"),
    [(3, heads, length) for length in (256, 300, 512) for heads in (1, 4, 20)]
    # Eight heads of so many positions have more scores than are computed at once.
    + [(2, heads, 1100) for heads in (1, 4, 8)],
)
@pytest.mark.parametrize("scale", [None, 0.3])
@torch.inference_mode()
def test_blocks_give_attention(
    num_sequences: int, num_heads: int, length: int, scale: float | None
) -> None:
    """Any number of heads and positions; nearer to float64 than `eager` in transformers."""
    q, k, v = tensors(num_sequences, num_heads, length)
    found = computed(BY_BLOCKS, q, k, v, scaling=scale)
    expected = exact(q, k, v, scale or 32**-0.5)
    assert not torch.equal(found, computed("sdpa", q, k, v, scaling=scale))
    eager = (q @ k.transpose(2, 3) * (scale or 32**-0.5)).masked_fill(later(length), -torch.inf)
    eager = eager.softmax(dim=3, dtype=torch.float32).to(torch.bfloat16) @ v
    assert error(found, expected) < error(eager, expected)
    assert error(found, expected) < 0.01


@torch.inference_mode()
def test_heads_may_share_keys() -> None:
    """Grouped-query attention."""
    q, k, v = tensors(num_heads=6, num_keys=2)
    apart = [x.repeat_interleave(3, dim=1) for x in (k, v)]
    assert torch.equal(computed(BY_BLOCKS, q, k, v), computed(BY_BLOCKS, q, *apart))


@torch.inference_mode()
def test_no_query_sees_a_later_key() -> None:
    """Whatever stands there."""
    q, k, v = tensors()
    before = computed(BY_BLOCKS, q, k, v)
    k[:, :, 200:], v[:, :, 200:] = 1e30, 1e4
    after = computed(BY_BLOCKS, q, k, v)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before[:, :, 200:], after[:, :, 200:])


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({}, 255),
        ({"is_causal": False}, 300),
        ({"attention_mask": torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()}, 300),
        ({"position_bias": torch.ones(1, 1, 300, 300, dtype=torch.bfloat16)}, 300),
        ({"dropout": 1.0}, 300),
        ({"dtype": torch.float32}, 300),
        ({"keys": 310}, 300),
    ],
    ids=["short", "not causal", "mask", "bias", "dropout", "float32", "more keys"],
)
@torch.inference_mode()
def test_other_calls_are_torchs_own(change: dict[str, Any], length: int) -> None:
    """To the last bit."""
    change = dict(change)
    dtype, keys = change.pop("dtype", torch.bfloat16), change.pop("keys", length)
    q, k, v = (x.to(dtype) for x in tensors(length=max(length, keys)))
    given = (q[:, :, :length], k[:, :, :keys], v[:, :, :keys])
    assert torch.equal(computed(BY_BLOCKS, *given, **change), computed("sdpa", *given, **change))


def test_a_softcap_is_refused_as_by_sdpa() -> None:
    """No call that asks for one computes something else."""
    for name in ("sdpa", BY_BLOCKS):
        with pytest.raises(ValueError, match="softcap"):
            computed(name, *tensors(), softcap=30.0)


FAMILIES: dict[str, tuple[Any, dict[str, int], str, int]] = {
    "rotary": (transformers.GPTNeoXConfig, {}, BY_BLOCKS, 2),
    "shared keys": (transformers.LlamaConfig, {"num_key_value_heads": 2}, BY_BLOCKS, 2),
    "sliding window": (
        transformers.MistralConfig,
        {"sliding_window": 100, "num_key_value_heads": 2},
        BY_BLOCKS,
        0,
    ),
    "attention of its own": (transformers.FalconConfig, {}, "sdpa", 0),
    "no sdpa": (transformers.GPTJConfig, {"rotary_dim": 8}, "eager", 0),
    "encoder": (transformers.BertConfig, {}, "sdpa", 0),
}
"""Config class, settings, attention that is chosen, and how often a pass of two layers computes it
in blocks."""


def saved(directory: Path, family: str) -> Path:
    """A model of two random layers."""
    config_class, settings, *_ = FAMILIES[family]
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
    auto = transformers.AutoModel if family == "encoder" else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what this machine's processor computes fast."""

    def be(*, fast: bool = True, tiles: bool = False) -> None:
        monkeypatch.setattr(module, "has_fast_bfloat16", lambda: fast)
        monkeypatch.setattr(module, "has_matrix_units", lambda: tiles)

    return be


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_takes_blocks_where_they_pay(
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processor: Callable[..., None],
) -> None:
    """A decoder in bfloat16, of a family that asks for attention by name; as near to float32."""
    *_, name, times = FAMILIES[family]
    saved(tmp_path, family)
    inputs = Inputs(
        tokens=torch.randint(0, 64, (2, 300), generator=torch.Generator().manual_seed(1))
    )
    calls: list[int] = []
    in_blocks = module._in_blocks
    monkeypatch.setattr(module, "_in_blocks", lambda *a: calls.append(1) or in_blocks(*a))

    def captured(dtype: str, expected: str) -> Tensor:
        model = load(tmp_path, dtype=dtype)
        assert model.attention_implementation == expected
        return capture(model, inputs, [1])["resid_post", 1].float()

    otherwise = "eager" if family == "no sdpa" else "sdpa"
    processor(fast=True)
    exactly = captured("float32", otherwise)
    processor(fast=False)
    ever = captured("bfloat16", otherwise)
    processor(tiles=True)
    assert torch.equal(captured("bfloat16", otherwise), ever)
    assert calls == []
    processor(fast=True)
    now = captured("bfloat16", name)
    assert len(calls) == times
    assert (now - exactly).norm() <= 1.1 * (ever - exactly).norm()
    assert torch.equal(now, ever) == (times == 0)


def test_a_name_means_the_same_on_every_processor(
    tmp_path: Path, processor: Callable[..., None]
) -> None:
    """The name in a plan can be computed again elsewhere; `sdpa` is torch's own everywhere."""
    saved(tmp_path, "rotary")
    inputs = Inputs(tokens=torch.arange(300)[None] % 64)
    found = {}
    for name in ("sdpa", BY_BLOCKS):
        for fast in (True, False):
            processor(fast=fast)
            model = load(tmp_path, dtype="bfloat16", attention_implementation=name)
            assert model.attention_implementation == name
            found[name, fast] = capture(model, inputs, [1])["resid_post", 1]
        assert torch.equal(found[name, True], found[name, False])
    assert not torch.equal(found["sdpa", True], found[BY_BLOCKS, True])


@pytest.mark.parametrize("family", ["attention of its own", "no sdpa"])
def test_a_family_that_does_not_ask_by_name_is_refused(family: str, tmp_path: Path) -> None:
    """Rather than computing another attention under that name."""
    with pytest.raises(InputError, match=f"--attn-implementation {BY_BLOCKS} does not work"):
        load(saved(tmp_path, family), attention_implementation=BY_BLOCKS)


@pytest.mark.parametrize("masked", ["padding", "documents"])
def test_masks_are_those_of_sdpa(masked: str, tmp_path: Path) -> None:
    """A pass with padding is masked as ever, and so computed by torch's kernel, to the last bit."""
    saved(tmp_path, "rotary")
    where = torch.zeros(2, 300, dtype=torch.bool)
    where[1, 280:] = True
    given = where if masked == "padding" else where.long()
    inputs = Inputs(tokens=torch.arange(600).view(2, 300) % 64, **{masked: given})
    found = [
        capture(load(tmp_path, dtype="bfloat16", attention_implementation=name), inputs, [1])
        for name in ("sdpa", BY_BLOCKS)
    ]
    assert torch.equal(*(each["resid_post", 1][~where] for each in found))
