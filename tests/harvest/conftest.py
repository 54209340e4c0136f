"""A tokenizer of fifty words, small random models that use it, and text to harvest."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mlsae.harvest import HarvestConfig
from mlsae.harvest.text.packing import PackedText, pack
from mlsae.harvest.text.sources import Document, Source

WORDS = [f"w{i}" for i in range(50)]


def make_tokenizer(*, eos: bool = True, bos: bool = False, adds_bos: bool = False) -> Any:
    """Ids: special tokens first, then the words."""
    special = [*(["<|endoftext|>"] if eos else []), *(["<s>"] if bos else [])]
    vocabulary = {word: index for index, word in enumerate([*special, "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>" if eos else None,
        bos_token="<s>" if bos else None,
        model_max_length=16,
    )


def make_texts(num_documents: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [
        " ".join(WORDS[i] for i in generator.integers(0, 50, generator.integers(1, 40)))
        for _ in range(num_documents)
    ]


@pytest.fixture(scope="session")
def packed_of() -> Callable[..., PackedText]:
    """Pack one data set of some texts on this disk: `packed_of(texts, tokenizer, …)`."""

    def make(texts: Iterable[Document], tokenizer: Any, **options: Any) -> PackedText:
        source = Source(name="texts", share=1.0, documents=iter(texts))
        return pack([source], tokenizer, spool=Path(__file__).parent, **options)

    return make


@pytest.fixture(scope="session")
def model_maker(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A directory with a random GPT-NeoX (4 layers, width 32, 48 positions) and a tokenizer."""

    def make(*, dtype: torch.dtype = torch.float32, scale: float = 1.0, **tokenizer: bool) -> Path:
        directory = tmp_path_factory.mktemp("model")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = transformers.GPTNeoXConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                intermediate_size=64, max_position_embeddings=48, initializer_range=0.1,
                bos_token_id=0, eos_token_id=0,
            )  # fmt: skip
            model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            model.gpt_neox.layers[2].mlp.dense_4h_to_h.bias[0] = 10.0 * scale
        model.to(dtype).save_pretrained(directory)
        make_tokenizer(**tokenizer).save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def model(model_maker: Callable[..., Path]) -> Path:
    return model_maker()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(120)


@pytest.fixture(scope="session")
def dataset(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def config(model: Path, dataset: Path, tmp_path: Path) -> Callable[..., HarvestConfig]:
    """A small harvest of several shards; keywords change it."""

    def make(**changes: Any) -> HarvestConfig:
        settings: dict[str, Any] = {
            "model": str(model),
            "dataset": str(dataset),
            "out": tmp_path / "acts",
            "context_length": 16,
            "batch_size": 3,
            "device": "cpu",
            "shard_size": 12_000,
        }
        return HarvestConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and text beside the checkout, where they are."""
    directory = Path(__file__).resolve().parents[3] / "shared"
    if not directory.is_dir():
        pytest.skip(f"no real tokenizers and text at {directory}")
    return directory


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def tokenizer_maker() -> Callable[..., Any]:
    return make_tokenizer
