"""Small random models of three families, with different block outputs and position encodings."""

from collections.abc import Callable
from pathlib import Path

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
