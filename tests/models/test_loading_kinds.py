"""Decoders and encoders: told apart, measured, and everything else refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from mlsae.base.errors import InputError
from mlsae.models import Inputs, load, load_for, outline
from mlsae.models.capture import capture
from mlsae.models.sites import check_sites
from mlsae.models.splice import run

BASIC: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ENCODERS = {
    "bert": transformers.BertConfig(**BASIC, max_position_embeddings=40),
    "roberta": transformers.RobertaConfig(**BASIC, max_position_embeddings=42, pad_token_id=1),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=61, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40
    ),
    "electra": transformers.ElectraConfig(**BASIC, embedding_size=8, max_position_embeddings=40),
}

# Each with what its config says of the longest sequence.
DECODERS = {
    "gpt2": (
        transformers.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=40,
            bos_token_id=0, eos_token_id=0,
        ),
        40,
    ),
    "opt": (
        transformers.OPTConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
            max_position_embeddings=40, word_embed_proj_dim=16, bos_token_id=0, eos_token_id=0,
        ),
        40,
    ),
    "bloom": (
        transformers.BloomConfig(
            vocab_size=61, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        ),
        None,
    ),
    "falcon": (
        transformers.FalconConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=40, bos_token_id=0, eos_token_id=0,
        ),
        40,
    ),
    "falcon-alibi": (
        transformers.FalconConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True,
            bos_token_id=0, eos_token_id=0,
        ),
        None,
    ),
}  # fmt: skip


def saved(directory: Path, auto_class: Any, config: Any, **options: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto_class.from_config(config, **options).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_have_no_head_and_look_both_ways(family: str, tmp_path: Path) -> None:
    path = saved(tmp_path, transformers.AutoModelForMaskedLM, ENCODERS[family])
    transformer = load(path)
    assert transformer.kind == transformer.describe()["kind"] == "encoder"
    assert transformer.backbone is transformer.model
    assert transformer.model.get_output_embeddings() is None
    assert (transformer.d_model, transformer.vocab_size) == (32, 61)
    assert transformer.max_context_length == outline(path).max_context_length == 40
    tokens = torch.arange(5, 45).view(1, 40)
    other = tokens.clone()
    other[0, -1] = 3
    with torch.no_grad():
        first, second = (transformer.model(input_ids=x)[0][0, 0] for x in (tokens, other))
    assert not torch.equal(first, second)


def test_an_encoder_is_the_same_model_with_its_head_or_without(tmp_path: Path) -> None:
    """A masked language model lacks the pooler, a bare model has one, and no layer needs it."""
    whole = saved(tmp_path / "whole", transformers.AutoModelForMaskedLM, ENCODERS["bert"])
    model = transformers.AutoModel.from_pretrained(whole)
    assert hasattr(model, "pooler")
    model.save_pretrained(tmp_path / "bare")
    record = load(whole).describe()
    assert load_for(record, tmp_path / "bare").describe() == record


def test_an_encoder_made_into_a_decoder_is_one(tmp_path: Path) -> None:
    config = transformers.BertConfig(**BASIC, is_decoder=True)
    transformer = load(saved(tmp_path, transformers.AutoModelForCausalLM, config))
    assert transformer.kind == "decoder"
    tokens = torch.arange(5, 15).view(1, 10)
    other = tokens.clone()
    other[0, -1] = 3
    with torch.no_grad():
        first, second = (transformer.model(input_ids=x).logits[0, :-1] for x in (tokens, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", DECODERS)
def test_sizes_of_decoders(family: str, tmp_path: Path) -> None:
    config, longest = DECODERS[family]
    path = saved(tmp_path, transformers.AutoModelForCausalLM, config)
    for transformer in (load(path), outline(path)):
        assert transformer.kind == "decoder"
        assert (transformer.num_layers, transformer.d_model, transformer.vocab_size) == (2, 32, 61)
        assert transformer.max_context_length == longest
    longest = longest or 100
    with torch.no_grad():
        load(path).model(input_ids=torch.ones(1, longest, dtype=torch.long))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "t5"}, r"\(t5\) has an encoder and a decoder, each with layers of its own"),
        ({"model_type": "bart"}, r"\(bart\) has an encoder and a decoder"),
        ({"model_type": "vit"}, r"\(vit\) is no text model that transformers knows: expected a"),
    ],
)
def test_other_kinds_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    for attempt in (load, outline):
        with pytest.raises(InputError, match=message) as info:
            attempt(tmp_path)
        assert "\n" not in str(info.value)


def test_the_path_of_the_blocks_is_recorded_and_can_be_given(tmp_path: Path) -> None:
    path = saved(tmp_path, transformers.AutoModelForCausalLM, DECODERS["opt"][0])
    found = load(path)
    assert found.blocks_path == found.describe()["blocks"] == "decoder.layers"
    given = load(path, blocks="decoder.layers")
    assert given.describe() == found.describe()
    assert outline(path, blocks="decoder.layers").blocks_path == "decoder.layers"
    for attempt in (load, outline):
        with pytest.raises(InputError, match=r"--blocks decoder\.levels: "):
            attempt(path, blocks="decoder.levels")


def vision_language(text: Any) -> Any:
    """A decoder beside a tower that sees images, of as many layers and more parameters."""
    tower = transformers.CLIPVisionConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        image_size=28, patch_size=14,
    )  # fmt: skip
    return transformers.LlavaConfig(text_config=text, vision_config=tower, image_token_index=50)


def test_the_decoder_of_a_model_that_also_sees_images_is_harvested(tmp_path: Path) -> None:
    text = transformers.LlamaConfig(**BASIC, max_position_embeddings=40)
    path = saved(tmp_path, transformers.AutoModelForImageTextToText, vision_language(text))
    transformer, sketch = load(path), outline(path)
    assert transformer.blocks_path == sketch.blocks_path == "language_model.layers"
    assert (transformer.kind, transformer.d_model, transformer.vocab_size) == ("decoder", 32, 61)
    tokens = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        out = transformer.model(input_ids=tokens, output_hidden_states=True)
    x = capture(transformer, Inputs(tokens=tokens), [0])["resid_post", 0]
    assert torch.equal(x, out.hidden_states[1])
    assert torch.equal(run(transformer, Inputs(tokens=tokens)), out.logits)


def test_blocks_that_wait_for_an_image_are_refused(tmp_path: Path) -> None:
    text = MllamaTextConfig(
        **BASIC, num_key_value_heads=2, pad_token_id=0, cross_attention_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=4,
        intermediate_size=48, vision_output_dim=64, image_size=28, patch_size=14,
        intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    config = transformers.MllamaConfig(text_config=text, vision_config=vision)
    path = saved(tmp_path, transformers.AutoModelForImageTextToText, config)
    with pytest.raises(InputError) as info:
        check_sites(load(path), ["resid_post"])
    assert str(info.value) == (
        f"model.layers.1 of model {path} (MllamaCrossAttentionDecoderLayer) does not run "
        "once in a forward pass on text alone, as blocks do: some wait for an image, others serve "
        "several layers; such a model is not supported"
    )


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (
            transformers.MptConfig(
                vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=32
            ),
            32,
        ),
        (
            transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48),
            None,
        ),
    ],
)  # fmt: skip
def test_longest_sequences_by_other_names(config: Any, longest: int | None, tmp_path: Path) -> None:
    path = saved(tmp_path, transformers.AutoModelForCausalLM, config)
    assert outline(path).max_context_length == longest
