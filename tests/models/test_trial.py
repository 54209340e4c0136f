"""Decoders prove themselves on a few tokens: none looks ahead, and none needs its cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mlsae.base.errors import InputError
from mlsae.models import Inputs, Transformer, load, load_for
from mlsae.models.capture import capture
from mlsae.models.passes.trial import looks_ahead
from mlsae.models.splice import run

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def made(directory: Path, config: Any) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return load(directory)


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertGenerationConfig(**SMALL, pad_token_id=0),
        transformers.LlamaConfig(**SMALL, is_causal=False),
        transformers.Gemma3TextConfig(
            **SMALL, head_dim=8, num_key_value_heads=2, use_bidirectional_attention=True
        ),
    ],
    ids=["BertGeneration", "Llama", "Gemma 3"],
)
def test_a_decoder_that_looks_both_ways_is_an_encoder(config: Any, tmp_path: Path) -> None:
    transformer = made(tmp_path, config)
    assert transformer.kind == "encoder"
    assert transformer.model is transformer.backbone
    tokens = torch.arange(3, 19).view(2, 8)
    with pytest.raises(InputError, match="is an encoder and predicts no next token: cross-entropy"):
        run(transformer, Inputs(tokens=tokens))
    expected = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        hidden = expected(input_ids=tokens, output_hidden_states=True).hidden_states
    assert torch.equal(capture(transformer, Inputs(tokens=tokens), [0])["resid_post", 0], hidden[1])
    for init in ("trained", "control"):
        record = load(tmp_path, init=init).describe()
        assert record["kind"] == "encoder"
        assert load_for(record, tmp_path).describe() == record


def test_blocks_that_share_keys_and_values_compute_as_with_the_cache(tmp_path: Path) -> None:
    config = transformers.Gemma4TextConfig(
        **SMALL | {"num_hidden_layers": 4}, num_key_value_heads=2, head_dim=8, global_head_dim=8,
        sliding_window=6, num_kv_shared_layers=2, hidden_size_per_layer_input=8, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=64,
    )  # fmt: skip
    tokens = torch.arange(3, 35).view(2, 16)
    x = capture(made(tmp_path, config), Inputs(tokens=tokens), range(3))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        hidden = plain(input_ids=tokens, output_hidden_states=True).hidden_states
    for layer in range(3):
        torch.testing.assert_close(x["resid_post", layer], hidden[layer + 1])


def test_a_family_that_cannot_look_ahead_though_its_config_says_so(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, is_causal=False
    )
    with pytest.raises(InputError) as info:
        made(tmp_path, config)
    assert str(info.value) == (
        f"the config of model {tmp_path} says is_causal: false, but transformers "
        f"{transformers.__version__} computes models of type mamba causally; install a newer "
        "version of transformers, or take is_causal out of config.json"
    )


def test_a_config_of_sizes_that_do_not_fit_is_one_line(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 2}, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2,
    )  # fmt: skip
    with pytest.raises(InputError) as info:
        made(tmp_path, config)
    assert str(info.value) == (
        f"model {tmp_path} cannot be run on sequences of 12 tokens by transformers "
        f"{transformers.__version__} (RuntimeError: The size of tensor a (4) must match the size "
        "of tensor b (8) at non-singleton dimension 1); unless another --attn-implementation or "
        "version of transformers runs it, such a model is not supported"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SMALL),
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
        transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    ],
    ids=["Llama", "Mixtral", "Mamba"],
)
def test_decoders_stay_decoders(config: Any, dtype: str, tmp_path: Path) -> None:
    path = made(tmp_path, config).name
    for init in ("trained", "control"):
        assert load(path, dtype=dtype, init=init).kind == "decoder"


def test_a_model_that_computes_otherwise_without_its_cache_is_refused(tmp_path: Path) -> None:
    transformer = made(tmp_path, transformers.LlamaConfig(**SMALL))

    scales: list[float] = []

    def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        scales.append(1.0 if given["use_cache"] else 1.5)

    def scale(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * scales[-1]

    transformer.backbone.register_forward_pre_hook(note, with_kwargs=True)
    transformer.backbone.get_submodule("layers.1.mlp").register_forward_hook(scale)
    with pytest.raises(InputError) as info:
        looks_ahead(transformer)
    assert str(info.value) == (
        f"model {tmp_path} computes other values without its key-value cache than with it: a "
        f"defect of transformers {transformers.__version__} for models of type llama; install a "
        "newer version of transformers"
    )
