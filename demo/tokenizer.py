"""The demo's tokenizer: byte-level BPE, as the Pythia models have it, with few entries."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Fit a byte-level BPE to `texts`; no text holds anything unknown to it.

    Returns:
        A transformers tokenizer whose EOS (and BOS, which it does not add) is END_OF_TEXT, id 0.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapper: Any = PreTrainedTokenizerFast
    return wrapper(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write the tokenizer so that AutoTokenizer finds its class in transformers 4 and 5 alike."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def pack(tokenizer: Any, texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Token ids (num_tokens,) of all texts, END_OF_TEXT after each."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return np.concatenate([np.array([*ids, end], dtype=np.int64) for ids in encoded])
