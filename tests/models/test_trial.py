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
    record = transformer.describe()
    assert load_for(record, tmp_path).describe() == record


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
    assert load(made(tmp_path, config).name, dtype=dtype).kind == "decoder"


def test_a_model_that_computes_otherwise_without_its_cache_is_refused(tmp_path: Path) -> None:
    transformer = made(tmp_path, transformers.LlamaConfig(**SMALL))

    def without(_module: Any, args: Any, given: dict[str, Any]) -> Any:
        hidden = given["hidden_states"] if "hidden_states" in given else args[0]
        scaled = hidden if given.get("past_key_values") is not None else 1.5 * hidden
        if "hidden_states" in given:
            return args, {**given, "hidden_states": scaled}
        return (scaled, *args[1:]), given

    transformer.blocks[1].register_forward_pre_hook(without, with_kwargs=True)
    with pytest.raises(InputError) as info:
        looks_ahead(transformer)
    assert str(info.value) == (
        f"model {tmp_path} computes other values without its key-value cache than with it: a "
        f"defect of transformers {transformers.__version__} for models of type llama; install a "
        "newer version of transformers"
    )
