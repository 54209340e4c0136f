"""The model in memory is its checkpoint: all of its weights are there, and none is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mlsae.base.errors import InputError
from mlsae.models import Inputs, load
from mlsae.models.capture import capture
from mlsae.models.splice import run

TOKENS = torch.arange(3, 19).view(2, 8)


def config(**more: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=False, **more,
    )  # fmt: skip


def saved(directory: Path, model_class: Any = transformers.LlamaForCausalLM, **more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config(**more)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(directory)
    return model


def patch(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory: Path) -> str:
    with pytest.raises(InputError) as info:
        load(directory)
    assert "\n" not in str(info.value)
    return str(info.value)


def is_right(directory: Path, model: Any) -> bool:
    """Activations after the first block are those of the model that was saved."""
    with torch.no_grad():
        hidden = model(input_ids=TOKENS, output_hidden_states=True).hidden_states[1]
    return torch.equal(
        capture(load(directory), Inputs(tokens=TOKENS), [0])["resid_post", 0], hidden
    )


def test_weights_that_the_config_has_no_place_for(tmp_path: Path) -> None:
    saved(tmp_path, attention_bias=True)
    patch(tmp_path, attention_bias=False)
    assert refused(tmp_path) == (
        f"model {tmp_path} is not what its files hold: the model that config.json describes has "
        "no place for 8 weights, the first model.layers.0.self_attn.k_proj.bias, and computes "
        "other values without; give the config.json that belongs to the weights"
    )


@pytest.mark.parametrize("name", ["model.norm.bias", "model.embed_tokens.scale"])
def test_weights_of_norms_and_embeddings_count_too(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, {**weights, name: torch.ones(32)})
    assert "has no place for 1 weight" in (line := refused(tmp_path))
    assert f"the first {name}, and computes" in line


def test_weights_of_no_block_embedding_or_norm_are_left_out_with_a_note(tmp_path: Path) -> None:
    """Blocks beyond the number in the config, and parts for other purposes."""
    model = saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    rewrite(
        tmp_path,
        {
            **weights,
            "model.layers.2.mlp.up_proj.weight": torch.ones(48, 32),
            "mtp.weight": torch.ones(3),
        },
    )
    assert load(tmp_path).notes == (
        f"left out: 2 weights in the files of {tmp_path} outside its blocks, embeddings and norms, "
        "the first model.layers.2.mlp.up_proj.weight",
    )
    assert is_right(tmp_path, model)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("gptj", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt_bigcode", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("xglm", ["model.embed_positions.weights"]),
        ("bert", ["bert.embeddings.position_ids", "bert.pooler.dense.weight", "cls.bias"]),
    ],
)
def test_masks_and_positions_of_older_versions_are_no_weights(
    family: str, keys: list[str], tmp_path: Path
) -> None:
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "rotary_dim": 8, "ffn_dim": 48,
        "d_model": 32, "num_layers": 2, "attention_heads": 4,
    }  # fmt: skip
    made = transformers.AutoConfig.for_model(family, **sizes)
    auto = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
    auto.from_config(made).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    plain = load(tmp_path)
    rewrite(tmp_path, {**weights, **{key: torch.ones(4, 4) for key in keys}})
    transformer = load(tmp_path)
    assert (transformer.notes, transformer.fingerprint()) == ((), plain.fingerprint())


@pytest.mark.parametrize(
    ("quantization", "method"),
    [({"quant_method": "modelopt", "quant_algo": "FP8"}, "'modelopt'"), ({"bits": 8}, "None")],
)
def test_a_quantisation_that_the_library_would_pass_over(
    quantization: dict[str, Any], method: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    patch(tmp_path, quantization_config=quantization)
    assert refused(tmp_path) == (
        f"model {tmp_path} is quantised by {method}, which transformers "
        f"{transformers.__version__} does not know: its weights would be read as if they were not "
        "quantised; give a copy in float32, float16 or bfloat16"
    )


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")]
)
def test_codes_without_scales(dtype: torch.dtype, stored: str, tmp_path: Path) -> None:
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, {**weights, name: (weights[name] * 100).to(dtype)})
    assert refused(tmp_path) == (
        f"{name} of model {tmp_path} is stored as {stored}, and config.json has no "
        "quantization_config that says how such codes become numbers; give a copy in float32, "
        "float16 or bfloat16"
    )


@pytest.mark.parametrize("with_weights", [True, False])
def test_an_adapter(with_weights: bool, tmp_path: Path) -> None:
    if with_weights:
        saved(tmp_path)
    base = {} if with_weights else {"base_model_name_or_path": "gpt2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **base}))
    of = "the model beside it" if with_weights else "gpt2"
    assert refused(tmp_path) == (
        f"{tmp_path} holds an adapter (LORA) of {of}, whose weights would be left out; merge it "
        "(merge_and_unload of peft, then save_pretrained) and give the merged model, or move "
        "adapter_config.json away to take the model without it"
    )


@pytest.mark.parametrize(
    ("model_class", "more"),
    [
        (transformers.LlamaModel, {}),
        (transformers.LlamaForSequenceClassification, {"num_labels": 1, "pad_token_id": 2}),
    ],
)
def test_a_decoder_without_its_head_is_its_backbone(
    model_class: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    model = saved(tmp_path, model_class, **more)
    transformer = load(tmp_path)
    assert (transformer.kind, transformer.predicts, transformer.notes) == ("decoder", False, ())
    assert is_right(tmp_path, model)
    with pytest.raises(InputError, match="is a decoder without its head and predicts no next"):
        run(transformer, Inputs(tokens=TOKENS))


def test_weights_by_other_names_are_not_fetched_again(tmp_path: Path) -> None:
    """An adapter's wrappers around linear maps, say."""
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    rewrite(
        tmp_path,
        {name.replace("q_proj", "q_proj.base_layer"): weight for name, weight in weights.items()},
    )
    assert refused(tmp_path) == (
        f"model {tmp_path} is incomplete: its files lack 2 of its weights or hold them in another "
        "shape, the first model.layers.0.self_attn.q_proj.weight; they hold 2 weights by other "
        "names, the first model.layers.0.self_attn.q_proj.base_layer.weight: give weights and "
        "config.json that belong together"
    )


@pytest.mark.parametrize("prefix", ["_orig_mod.", "_fsdp_wrapped_module._orig_mod.", "module."])
def test_names_of_a_wrapped_model_are_understood(prefix: str, tmp_path: Path) -> None:
    model = saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    plain = load(tmp_path).fingerprint()
    rewrite(tmp_path, {f"{prefix}{name}": weight for name, weight in weights.items()})
    assert load(tmp_path).fingerprint() == plain
    assert is_right(tmp_path, model)


def test_a_head_that_the_config_ties_to_other_embeddings_is_the_files(tmp_path: Path) -> None:
    model = saved(tmp_path)
    patch(tmp_path, tie_word_embeddings=True)
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    torch.testing.assert_close(run(load(tmp_path), Inputs(tokens=TOKENS)), expected)
