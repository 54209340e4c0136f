import json
from pathlib import Path
from typing import Any

import numpy as np

from mlsae.demo.tokenizer import END_OF_TEXT, pack, save_tokenizer, train_tokenizer


def test_shipped_tokenizer_gives_back_any_text(demo_model: Path, lines: Any) -> None:
    """Decoding undoes encoding, for the shipped text and for bytes that it never held."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    texts = [line["text"] for line in lines("held_out.jsonl")]
    for text in [*texts, "naïve — 漢字 🙂 \x00\t  two  spaces "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_shipped_tokenizer_adds_nothing_and_names_its_separator(demo_model: Path) -> None:
    """EOS is END_OF_TEXT with id 0, and encoding adds no special token by itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    assert tokenizer.eos_token == tokenizer.bos_token == END_OF_TEXT
    assert tokenizer(END_OF_TEXT)["input_ids"] == [0]
    assert 0 not in tokenizer("some text")["input_ids"]


def test_shipped_tokenizer_is_the_one_the_shipped_text_gives(demo_model: Path, lines: Any) -> None:
    """Fitting to the training part alone gives the shipped tokenizer again."""
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(demo_model)
    fitted = train_tokenizer([line["text"] for line in lines("train.jsonl")], len(shipped))
    assert fitted.get_vocab() == shipped.get_vocab()


def test_pack_puts_the_separator_after_each_text() -> None:
    """Packed ids are each text's ids and id 0."""
    tokenizer = train_tokenizer(["ab ab", "c"], 300)
    ids = pack(tokenizer, ["ab", "c"])
    assert ids.dtype == np.int64
    assert np.flatnonzero(ids == 0)[-1] == len(ids) - 1
    assert (ids == 0).sum() == 2


def test_saved_tokenizer_names_a_class_that_transformers_4_has_too(tmp_path: Path) -> None:
    """The saved class is PreTrainedTokenizerFast, and AutoTokenizer reads the files back."""
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(["ab ab", "c"], 300)
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
