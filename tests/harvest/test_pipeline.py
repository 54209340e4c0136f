"""A harvest from text to a finished store, and everything that stops one before it starts."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlsae.base.errors import InputError, ResourceError
from mlsae.harvest import HarvestConfig, run
from mlsae.harvest.text.packing import pack
from mlsae.harvest.text.sources import Source
from mlsae.models import load, load_for
from mlsae.models.families import attention
from mlsae.store import ActivationError, NotAStoreError, PlanMismatchError, open_store
from mlsae.store.format.presets import PRESETS

MakeConfig = Callable[..., HarvestConfig]


def refused(config: HarvestConfig, error: type[Exception]) -> str:
    with pytest.raises(error) as info:
        run(config)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("tokenizer", [{}, {"bos": True, "adds_bos": True}], ids=["eos", "bos"])
def test_store_holds_the_models_activations_on_the_packed_text(
    tokenizer: dict[str, bool],
    config: MakeConfig,
    model_maker: Callable[..., Path],
    texts: list[str],
) -> None:
    """Every row of every layer equals the library's hidden state, rounded to float16."""
    settings = config(model=str(model_maker(**tokenizer)))
    result = run(settings)
    assert result is not None
    store = open_store(settings.out)
    model = load(settings.model)
    source = Source(name="texts", share=1.0, documents=iter(texts))
    packed = pack([source], model.tokenizer, context_length=16, spool=settings.out)
    np.testing.assert_array_equal(store.tokens(), packed.tokens)
    np.testing.assert_array_equal(store.documents(), packed.documents)
    np.testing.assert_array_equal(store.token_flags(), packed.token_flags)
    assert (store.layers, store.encoding, store.d_model) == ((0, 1, 2, 3), "float16", 32)
    assert store.num_tokens // store.shard_rows > 3
    assert store.num_tokens % (3 * 16) != 0, "the last batch must be a short one"
    ids = torch.from_numpy(packed.tokens.astype(np.int64)).reshape(-1, 16)
    with torch.no_grad():
        states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in range(3):
        stored = store.read("resid_post", layer, 0, store.num_rows)
        expected = states[layer + 1].reshape(-1, 32).numpy()
        np.testing.assert_allclose(stored, expected, rtol=2**-10, atol=1e-6)
    last = store.read("resid_post", 3, 0, store.num_rows)
    normed = model.backbone.final_layer_norm(torch.from_numpy(last))
    torch.testing.assert_close(normed, states[4].reshape(-1, 32), rtol=2e-3, atol=2e-3)
    assert (result.path, result.store_id, result.num_tokens, result.layers) == (
        settings.out, store.store_id, store.num_tokens, store.layers,
    )  # fmt: skip


def test_same_plan_gives_the_same_store_and_batch_size_another_plan(
    config: MakeConfig, tmp_path: Path
) -> None:
    first, again, other = (
        run(config(out=tmp_path / name, batch_size=size, max_tokens=640))
        for name, size in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first is not None
    assert again is not None
    assert other is not None
    assert first.store_id == again.store_id != other.store_id


def test_plan_names_model_tokenizer_and_packing(config: MakeConfig) -> None:
    settings = config()
    run(settings)
    store = open_store(settings.out)
    source = store.source
    assert sorted(source) == ["model", "packing", "tokenizer_sha256"]
    assert source["packing"] == {
        "packing": "concatenate", "document_eos": 0, "document_bos": None, "context_bos": None,
        "isolate_documents": False, "padding": None,
    }  # fmt: skip
    (place,) = [record["model"] for record in store.provenance()]
    assert load_for(source["model"], place["name"]).describe() == source["model"]
    assert str(Path(settings.model).resolve()) == place["name"]
    assert place["name"] not in str(store.plan)


@pytest.mark.parametrize(
    ("dtype", "asked", "encoding"),
    [
        (torch.bfloat16, "auto", "bfloat16"),
        (torch.float16, "auto", "float16"),
        (torch.float32, "bfloat16", "bfloat16"),
        (torch.float32, "float32", "float32"),
    ],
)
def test_encoding_follows_the_checkpoint_or_the_flag(
    dtype: torch.dtype,
    asked: str,
    encoding: str,
    config: MakeConfig,
    model_maker: Callable[..., Path],
) -> None:
    settings = config(model=str(model_maker(dtype=dtype)), encoding=asked, max_tokens=200)
    run(settings)
    store = open_store(settings.out)
    assert store.encoding == encoding
    assert store.source["model"]["dtype"] == str(dtype).removeprefix("torch.")
    model = load(settings.model)
    ids = torch.from_numpy(store.tokens().astype(np.int64)).reshape(-1, 16)
    with torch.no_grad():
        states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    stored = torch.from_numpy(store.read("resid_post", 1, 0, store.num_rows))
    expected = states[2].reshape(-1, 32).to(getattr(torch, encoding)).float()
    tolerance = 0.05 if dtype != torch.float32 else 0.01
    torch.testing.assert_close(stored, expected, rtol=tolerance, atol=tolerance)


def test_layers_are_a_choice(config: MakeConfig) -> None:
    settings = config(layers=(3, 1), max_tokens=100)
    run(settings)
    store = open_store(settings.out)
    assert store.layers == (1, 3)
    assert store.num_tokens == 96


def test_the_plan_says_how_attention_is_computed(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention decides bits: another CPU finishes a harvest by the attention that began it."""
    monkeypatch.setattr(attention, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(attention, "has_matrix_units", lambda: False)
    settings = config(max_tokens=500, model_dtype="bfloat16")
    run(settings)
    store = open_store(settings.out)
    assert store.source["model"]["attention_implementation"] == "sdpa_by_blocks"
    monkeypatch.setattr(attention, "has_fast_bfloat16", lambda: False)
    assert "sdpa_by_blocks there, sdpa here" in refused(settings, PlanMismatchError)
    again = replace(settings, attention_implementation="sdpa_by_blocks")
    result = run(again)
    assert result is not None
    assert result.store_id == store.store_id


def test_finished_harvest_is_left_as_it_is(
    config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(max_tokens=500)
    first = run(settings)
    capsys.readouterr()
    again = run(settings)
    assert first is not None
    assert again is not None
    assert again.store_id == first.store_id
    assert (first.bytes_written > 0, again.bytes_written) == (True, 0)
    assert "going on: 4 of 4 shards are there" in capsys.readouterr().out


def test_end_of_a_harvest_shows_the_moments_by_layer(
    config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table's figures equal a float64 computation over the rows it names."""
    settings = config(layers=(0, 2))
    run(settings)
    lines = capsys.readouterr().out.splitlines()
    store = open_store(settings.out)
    rows = store.eligible(skip_positions=1)
    x = {
        layer: store.read("resid_post", layer, 0, store.num_rows)[rows].astype(float)
        for layer in store.layers
    }
    centred = {layer: values - values.mean(axis=0) for layer, values in x.items()}
    cosine = (centred[0] * centred[2]).sum() / np.sqrt(
        (centred[0] ** 2).sum() * (centred[2] ** 2).sum()
    )
    table = {line.split()[0]: line.split()[1:] for line in lines if line.split()[0] in ("0", "2")}
    for layer in store.layers:
        norm, largest = (float(text) for text in table[str(layer)][:2])
        assert norm == pytest.approx(np.linalg.norm(x[layer], axis=1).mean(), rel=1e-4)
        assert largest == pytest.approx(np.abs(x[layer]).max(), rel=1e-4)
    assert float(table["0"][2]) == pytest.approx(cosine, abs=1e-4)
    assert lines[-3] == (
        f"over {int(rows.sum()):,} rows of each layer, without position 0 and special tokens"
    )
    assert lines[-2] == "cosine: pooled over rows, about each layer's mean"
    assert f"store_id {store.store_id[:12]}" in lines[-1]


def test_text_that_is_left_out_or_empty_is_reported(
    config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["w1 " * 40, "", "w2 w3"]))
    run(config(dataset=str(path)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "packed 32 tokens: 2 sequences of 16 from 2 documents",
        "left out: the final incomplete sequence, 12 tokens",
        "passed over: 1 empty document",
    ]


def test_dry_run_says_what_would_be_made_and_writes_nothing(
    config: MakeConfig, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(dry_run=True, max_tokens=1000)
    assert run(settings) is None
    assert not settings.out.exists()
    text = capsys.readouterr().out
    assert "packed 992 tokens: 62 sequences of 16" in text
    assert "activations: resid_post of 4 layers (0–3 of 0–3), 32 channels, 992 rows of each" in text
    assert "\nfloat16 (auto): " in text
    assert "float32" not in text
    assert re.search(r"\ntime: about \d+ s for the transformer here, by one batch of it\n", text)
    assert f"free at {settings.out}: " in text
    words = " <|endoftext|> ".join(texts).split()[:40]
    assert f"first 40 tokens: {' '.join(words)!r}" in text
    assert text.endswith("dry run: nothing was written\n")


def test_dry_run_has_the_size_in_every_encoding_on_request(
    config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(dry_run=True, encoding="all", max_tokens=100))
    lines = capsys.readouterr().out.splitlines()
    assert set(PRESETS) <= {line.split(": ")[0] for line in lines}
    with pytest.raises(InputError, match=r"--encoding must be auto, .*, got 'all'"):
        config(encoding="all")


def test_dry_run_goes_on_where_the_model_cannot_be_tried(
    config: MakeConfig, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever plans on a small machine has the weights elsewhere."""
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    run(config(dry_run=True, model=str(tmp_path / "model")))
    text = capsys.readouterr().out
    assert "\nnot tried: " in text
    assert "\nfloat16 (auto): " in text
    assert "time: " not in text


def test_dry_run_names_the_bytes_that_the_harvest_then_takes(
    config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlsae.base.units import parse_bytes

    run(config(dry_run=True))
    line = next(li for li in capsys.readouterr().out.splitlines() if li.startswith("float16"))
    announced = parse_bytes(line.split(": ")[1].split(",")[0].replace(" ", ""))
    settings = config()
    run(settings)
    taken = sum(file.stat().st_size for file in settings.out.rglob("*") if file.is_file())
    assert 0.8 * taken < announced < 1.25 * taken


def test_context_longer_than_the_models_is_refused(config: MakeConfig) -> None:
    settings = config(context_length=49)
    text = refused(settings, InputError)
    assert "--context-length 49 is longer than the 48 positions of model" in text
    assert not settings.out.exists()


def test_context_length_is_by_default_the_models(config: MakeConfig) -> None:
    settings = config(context_length=None, max_tokens=500)
    run(settings)
    assert open_store(settings.out).context_length == 48


def test_absent_layer_is_refused_naming_those_there(config: MakeConfig) -> None:
    settings = config(layers=(0, 4))
    text = refused(settings, InputError)
    assert "has no layer 4: its layers are 0 to 3" in text
    assert not settings.out.exists()


def test_absent_cuda_is_refused(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda was asked for" in refused(config(device="cuda"), ResourceError)


def test_another_plan_at_out_is_refused(config: MakeConfig) -> None:
    settings = config(max_tokens=500)
    first = run(settings)
    text = refused(config(max_tokens=400), PlanMismatchError)
    assert f"{settings.out} holds a store of another plan" in text
    again = run(settings)
    assert first is not None
    assert again is not None
    assert again.store_id == first.store_id


def test_directory_with_other_things_is_refused_before_any_work(
    config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "thesis.tex").write_text("")
    text = refused(config(model="./no/such/model"), NotAStoreError)
    assert "is not empty and holds no store (it has thesis.tex)" in text


def test_store_over_max_disk_is_refused_naming_what_fits(config: MakeConfig) -> None:
    settings = config(max_disk=300_000)
    text = refused(settings, ResourceError)
    assert "the store would take" in text
    assert "over --max-disk 300 kB; use --max-tokens" in text
    assert not settings.out.exists()


def test_store_larger_than_the_disk_is_refused(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlsae.base.machine.resources.free_disk", lambda _: 100_000)
    settings = config()
    text = refused(settings, ResourceError)
    assert "not enough disk for the store" in text
    assert "use a smaller --max-tokens, fewer --layers or --keep-positions" in text
    assert not settings.out.exists()


def test_what_is_written_already_needs_no_room_again(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that the store has nearly filled, the same command still goes on."""
    settings = config()
    first = run(settings)
    monkeypatch.setattr("mlsae.base.machine.resources.free_disk", lambda _: 200_000)
    again = run(settings)
    assert first is not None
    assert again is not None
    assert again.store_id == first.store_id


def test_magnitudes_over_16000_need_a_flag(
    config: MakeConfig, model_maker: Callable[..., Path]
) -> None:
    large = str(model_maker(scale=2_000.0))
    settings = config(model=large)
    text = refused(settings, InputError)
    assert "layer 2 (resid_post) reaches 20,0" in text or "layer 3 (resid_post) reac" in text
    assert "use --encoding bfloat16" in text
    assert not settings.out.exists()
    # A channel of 20,000 that hardly varies, in eight bits, is more than is accepted unasked.
    run(config(model=large, encoding="bfloat16", max_tokens=100, max_encoding_fvu=1e3))
    assert open_store(settings.out).encoding == "bfloat16"


def test_overflow_of_an_explicit_float16_stops_the_harvest(
    config: MakeConfig, model_maker: Callable[..., Path]
) -> None:
    huge = str(model_maker(scale=10_000.0))
    text = refused(config(model=huge, encoding="float16"), ActivationError)
    assert "layer 2 (resid_post), row 0" in text
    assert "use --encoding bfloat16" in text


def test_model_that_gives_nan_is_refused_before_anything_is_made(
    config: MakeConfig, model_maker: Callable[..., Path]
) -> None:
    settings = config(model=str(model_maker(scale=float("nan"))))
    text = refused(settings, ActivationError)
    assert "layer 2 (resid_post) gives values that are not finite" in text
    assert not settings.out.exists()


def test_tokenizer_of_another_model_is_refused(
    config: MakeConfig, model_maker: Callable[..., Path]
) -> None:
    directory = model_maker()
    path = directory / "tokenizer.json"
    tokenizer: dict[str, Any] = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["w49"] = 64
    path.write_text(json.dumps(tokenizer))
    text = refused(config(model=str(directory)), InputError)
    assert "the text holds token 64, but the embedding of" in text
    assert "has 64 rows; model and tokenizer" in text


def test_missing_text_and_model_are_refused(config: MakeConfig) -> None:
    assert "there is no data set ./none.txt" in refused(config(dataset="./none.txt"), InputError)
    assert "there is no model directory ./none" in refused(config(model="./none"), InputError)
