"""Small random models of three families, with different block outputs and position encodings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mlsae.models import Transformer, load

SIZES = {
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=48, bos_token_id=0, eos_token_id=0,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=48,
        bos_token_id=0, eos_token_id=0,
    ),
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=48,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def make_model_directory(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            with torch.random.fork_rng():
                torch.manual_seed(0)
                config = SIZES[family]()
                # The default initialisation is so small that blocks hardly change the stream.
                config.initializer_range = 0.2
                model = transformers.AutoModelForCausalLM.from_config(config)
            model.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session", params=list(SIZES))
def model_directory(
    request: pytest.FixtureRequest, make_model_directory: Callable[[str], Path]
) -> Path:
    return make_model_directory(request.param)


@pytest.fixture(scope="session")
def transformer(model_directory: Path) -> Transformer:
    return load(model_directory)


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(1))


def _sized(config_class: Any, **settings: Any) -> Any:
    """A config of three blocks of width 32, whatever the family calls these."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 48, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    return config_class(**{**sizes, **settings})


FAMILIES: dict[str, Callable[[], Any]] = {
    "GPT-NeoX": lambda: _sized(transformers.GPTNeoXConfig, use_parallel_residual=True),
    "GPT-NeoX, sequential": lambda: _sized(
        transformers.GPTNeoXConfig, use_parallel_residual=False
    ),
    "GPT-2": lambda: _sized(transformers.GPT2Config),
    "Llama": lambda: _sized(transformers.LlamaConfig, num_key_value_heads=2),
    "Mistral": lambda: _sized(
        transformers.MistralConfig, num_key_value_heads=2, sliding_window=5
    ),
    "Mixtral": lambda: _sized(
        transformers.MixtralConfig, num_key_value_heads=2, num_local_experts=3
    ),
    "Gemma 2": lambda: _sized(
        transformers.Gemma2Config, num_key_value_heads=2, head_dim=8, sliding_window=5,
        query_pre_attn_scalar=8,
    ),
    "Gemma 3": lambda: _sized(
        transformers.Gemma3TextConfig, num_key_value_heads=2, head_dim=8, sliding_window=5,
        query_pre_attn_scalar=8, layer_types=["sliding_attention"] * 2 + ["full_attention"],
    ),
    "Qwen 2": lambda: _sized(transformers.Qwen2Config, num_key_value_heads=2),
    "Qwen 3": lambda: _sized(transformers.Qwen3Config, num_key_value_heads=2, head_dim=8),
    "OPT": lambda: _sized(
        transformers.OPTConfig, ffn_dim=48, init_std=0.2, word_embed_proj_dim=32
    ),
    "OPT, post-norm (350m)": lambda: _sized(
        transformers.OPTConfig, ffn_dim=48, init_std=0.2, word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
    "GPT-J": lambda: _sized(transformers.GPTJConfig, rotary_dim=8),
    "Phi": lambda: _sized(transformers.PhiConfig),
    "Falcon": lambda: _sized(transformers.FalconConfig, alibi=False),
    "Falcon, ALiBi": lambda: _sized(transformers.FalconConfig, alibi=True, multi_query=False),
    "Falcon, two norms": lambda: _sized(
        transformers.FalconConfig, new_decoder_architecture=True, num_kv_heads=2
    ),
    "Falcon, sequential": lambda: _sized(
        transformers.FalconConfig, parallel_attn=False, multi_query=False
    ),
    "BLOOM": lambda: _sized(transformers.BloomConfig),
    "BERT": lambda: _sized(transformers.BertConfig),
    "RoBERTa": lambda: _sized(transformers.RobertaConfig),
    "DistilBERT": lambda: transformers.DistilBertConfig(
        vocab_size=64, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=48,
        initializer_range=0.2,
    ),
    "ModernBERT": lambda: _sized(
        transformers.ModernBertConfig, local_attention=6, global_attn_every_n_layers=2,
        cls_token_id=1, sep_token_id=1,
    ),
    "ELECTRA": lambda: _sized(transformers.ElectraConfig, embedding_size=16),
}  # fmt: skip
"""Small random models, one of each family that `docs/models.md` speaks of."""


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Transformer]:
    """Load a family's model, saved by the class that its config names."""
    made: dict[str, Transformer] = {}

    def make(name: str) -> Transformer:
        if name not in made:
            directory = tmp_path_factory.mktemp("family") / name
            config = FAMILIES[name]()
            encodes = config.model_type in {
                "bert",
                "roberta",
                "distilbert",
                "modernbert",
                "electra",
            }
            auto = transformers.AutoModel if encodes else transformers.AutoModelForCausalLM
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = auto.from_config(config)
                # Norms that do nothing and biases of zero would hide what is added where.
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        torch.nn.init.normal_(parameter, mean=0.3, std=0.3)
            model.save_pretrained(directory)
            made[name] = load(directory)
        return made[name]

    return make


@pytest.fixture(params=list(FAMILIES))
def any_family(
    request: pytest.FixtureRequest, make_family: Callable[[str], Transformer]
) -> Transformer:
    return make_family(request.param)


@pytest.fixture(scope="session")
def family_names() -> list[str]:
    return list(FAMILIES)
