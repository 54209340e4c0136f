"""Folders as people have them: no tokenizer, no head, a padding token without an embedding."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mlsae.analyze.transformer import find_pieces, find_places, find_transformer
from mlsae.base.errors import InputError
from mlsae.harvest import HarvestConfig, run
from mlsae.models import Inputs, load
from mlsae.models.capture import capture
from mlsae.models.splice import run as logits_of
from mlsae.store import PADDING, open_store

MakeConfig = Callable[..., HarvestConfig]


def without_tokenizer(model: Path, to: Path) -> Path:
    shutil.copytree(model, to, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    return to


def refused(config: HarvestConfig) -> str:
    with pytest.raises(InputError) as info:
        run(config)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_a_model_without_tokenizer_takes_another(
    config: MakeConfig, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store is that of the model with its tokenizer, and its tokens are found again."""
    bare = without_tokenizer(model, tmp_path / "bare")
    assert refused(config(model=str(bare))) == (
        f"{bare} holds no tokenizer: expected tokenizer.json beside the model; save the model's "
        "tokenizer there, or name the place of one with --tokenizer"
    )
    result = run(config(model=str(bare), tokenizer=str(model), max_tokens=96))
    expected = run(config(out=tmp_path / "whole", max_tokens=96))
    assert result is not None
    assert expected is not None
    assert result.store_id == expected.store_id
    store = open_store(result.path)
    for given in (None, bare):
        places = find_places(store, given)
        pieces, reason = find_pieces(store, places)
        assert (pieces is not None, reason) == (True, None)
        transformer, _ = find_transformer(store, "resid_post", places, torch.device("cpu"))
        assert transformer is not None
        assert transformer.tokenizer.get_vocab()
    capsys.readouterr()


def test_a_tokenizer_that_needs_a_package(
    config: MakeConfig, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = without_tokenizer(model, tmp_path / "bare")
    (bare / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert refused(config(model=str(bare))) == (
        f"tokenizer tokenizer.model of {bare} is read by sentencepiece, which is not installed: "
        "pip install sentencepiece protobuf"
    )


def test_padding_needs_no_embedding(config: MakeConfig, model: Path, tmp_path: Path) -> None:
    """A padding token that was added without resizing the embedding is seen by no token."""
    padded = Path(shutil.copytree(model, tmp_path / "padded"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(padded)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens([f"x{i}" for i in range(64 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[BEYOND]"})
    tokenizer.save_pretrained(padded)
    assert tokenizer.pad_token_id >= 64
    whole = load(padded)
    for isolated in (False, True):
        out = tmp_path / f"acts-{isolated}"
        run(
            config(
                model=str(padded), out=out, packing="document", max_tokens=96, encoding="float32",
                isolate_documents=isolated,
            )
        )  # fmt: skip
        store = open_store(out)
        tokens, flags = store.tokens(), store.token_flags()
        assert int(tokens[flags & PADDING != 0].max()) == tokenizer.pad_token_id
        for row in range(0, 96, 16):
            seen = tokens[row : row + 16][flags[row : row + 16] & PADDING == 0].astype(np.int64)
            alone = capture(whole, Inputs(tokens=torch.from_numpy(seen)[None]), [1])
            np.testing.assert_allclose(
                store.read("resid_post", 1, row, row + len(seen)),
                alone["resid_post", 1][0].numpy(),
                rtol=1e-4,
                atol=1e-5,
            )
    inputs = Inputs(tokens=torch.tensor([[5, 99]]), padding=torch.tensor([[False, True]]))
    assert bool(logits_of(whole, inputs).isfinite().all())


def test_a_decoder_without_its_head_is_harvested_and_its_cross_entropy_is_not_measured(
    config: MakeConfig, model: Path, tmp_path: Path
) -> None:
    headless = Path(shutil.copytree(model, tmp_path / "headless"))
    weights = load_file(headless / "model.safetensors")
    del weights["embed_out.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    result = run(config(model=str(headless), max_tokens=96))
    assert result is not None
    whole = run(config(out=tmp_path / "whole", max_tokens=96))
    assert whole is not None
    store, other = open_store(result.path), open_store(whole.path)
    np.testing.assert_array_equal(
        store.read("resid_post", 3, 0, 96), other.read("resid_post", 3, 0, 96)
    )
    found = find_transformer(store, "resid_post", find_places(store, None), torch.device("cpu"))
    assert found == (
        None,
        f"model {headless} was saved without its head and predicts no next token, so that "
        "cross-entropy cannot be measured",
    )


def test_weights_that_are_left_out_are_said_once(
    config: MakeConfig, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = Path(shutil.copytree(model, tmp_path / "more"))
    weights = load_file(more / "model.safetensors")
    save_file(
        {**weights, "mtp.weight": torch.ones(2)},
        more / "model.safetensors",
        metadata={"format": "pt"},
    )
    run(config(model=str(more), max_tokens=96))
    line = (
        f"left out: 1 weight in the files of {more} outside its blocks, embeddings and norms, the "
        "first mtp.weight\n"
    )
    assert capsys.readouterr().out.count(line) == 1


def test_a_rank_without_a_first_says_what_it_waits_for(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def give_up(_seconds: float) -> None:
        raise InputError("the test waits no longer")

    monkeypatch.setattr("mlsae.base.ranks.QUIET_SECONDS", 0.0)
    monkeypatch.setattr("time.sleep", give_up)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = config()
    assert refused(settings) == "the test waits no longer"
    assert capsys.readouterr().out == (
        f"rank 1 waits for rank 0 to make the plan at {settings.out}; if no other process runs "
        "this command, unset RANK and WORLD_SIZE\n"
    )


def test_the_embedded_tokenizer_has_a_name(config: MakeConfig) -> None:
    assert Path(str(config(tokenizer="demo").tokenizer)).is_dir()
