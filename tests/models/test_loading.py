"""Loading: what a model says of itself, and one clear line for each way it can fail."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlsae.base.devices import resolve_device
from mlsae.base.errors import InputError, ResourceError
from mlsae.models import Transformer, load, load_for, load_tokenizer, outline


@pytest.fixture
def copied(make_model_directory: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_model_directory("gpt_neox"), tmp_path / "model"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def one_line(info: pytest.ExceptionInfo[Exception]) -> str:
    text = str(info.value)
    assert "\n" not in text
    return text


def test_sizes_and_state(transformer: Transformer) -> None:
    assert (transformer.num_layers, transformer.d_model, transformer.vocab_size) == (4, 32, 61)
    assert transformer.max_context_length == 48
    assert (transformer.device.type, transformer.dtype) == ("cpu", torch.float32)
    assert not transformer.model.training
    assert not any(p.requires_grad for p in transformer.model.parameters())


def test_outline_has_the_sizes_and_no_weights(model_directory: Path) -> None:
    whole, sketch = load(model_directory), outline(model_directory)
    for name in ("num_layers", "d_model", "vocab_size", "max_context_length", "config_hash"):
        assert getattr(sketch, name) == getattr(whole, name)
    assert sketch.device.type == "meta"


def test_load_for_rebuilds_what_describe_recorded(model_directory: Path) -> None:
    first = load(model_directory, dtype="bfloat16", attention_implementation="eager")
    record = json.loads(json.dumps(first.describe()))
    again = load_for(record, model_directory)
    assert again.describe() == first.describe()
    assert again.dtype == torch.bfloat16
    assert again.attention_implementation == "eager"


def test_a_moved_model_is_the_same_model(copied: Path, tmp_path: Path) -> None:
    record, place = load(copied).describe(), load(copied).place()
    moved = copied.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"there is no model directory .*/model; give another"):
        load_for(record, str(place["name"]))
    assert load_for(record, moved).describe() == record


def test_load_for_refuses_other_weights(copied: Path) -> None:
    record = load(copied).describe()
    weights = load_file(copied / "model.safetensors")
    weights["embed_out.weight" if "embed_out.weight" in weights else "lm_head.weight"][0, 0] += 1
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"is not the one .* expected weights with SHA-256 \w{12}"):
        load_for(record, copied)


def test_load_for_refuses_another_config(copied: Path) -> None:
    record = load(copied).describe()
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    with pytest.raises(InputError, match=r"is not the one .* expected config with SHA-256 \w{12}"):
        load_for(record, copied)


def test_missing_directory() -> None:
    with pytest.raises(InputError) as info:
        load("./no/such/model")
    assert one_line(info) == (
        "there is no model directory ./no/such/model; give another path or a hub id"
    )


def test_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError) as info:
        load(tmp_path)
    assert "is no model directory: it holds no config.json" in one_line(info)


@pytest.mark.usefixtures("no_hub")
def test_hub_model_without_network_says_where_it_was_looked_for() -> None:
    with pytest.raises(InputError) as info:
        load("someone/some-model-that-is-not-cached")
    text = one_line(info)
    assert "cannot find model 'someone/some-model-that-is-not-cached'" in text
    assert "cannot be reached; give a local directory, or run `hf download someone/" in text


def test_name_that_can_be_no_hub_id() -> None:
    with pytest.raises(InputError) as info:
        load("no such model")
    assert "there is no model 'no such model': no such directory here" in one_line(info)


def test_damaged_weights(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError) as info:
        load(copied)
    assert f"the weights of model {copied} are damaged" in one_line(info)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a pointer of Git LFS, not the file itself; fetch it with git lfs pull in ",
        ),
        (b"\n<!DOCTYPE html><html>", "is a web page, such as a server sends where one has to log"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_files_that_are_something_else_are_not_called_damaged(
    name: str, content: bytes, line: str, copied: Path
) -> None:
    (copied / name).write_bytes(content)
    with pytest.raises(InputError) as info:
        _ = load(copied).tokenizer
    assert one_line(info).startswith(f"{copied / name} {line}")


def test_no_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(InputError) as info:
        load(copied)
    assert f"model in {copied} cannot be read: Error no file named" in one_line(info)


def test_weights_that_lack_a_tensor_are_refused_not_drawn_at_random(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["gpt_neox.layers.2.mlp.dense_h_to_4h.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as info:
        load(copied)
    assert "lack 1 of its weights" in one_line(info)
    assert "the first gpt_neox.layers.2.mlp.dense_h_to_4h.weight" in one_line(info)


def test_weights_of_another_shape_are_refused(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    name = "gpt_neox.layers.2.mlp.dense_h_to_4h.weight"
    weights[name] = weights[name][:5].contiguous()
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as info:
        load(copied)
    assert one_line(info) == (
        f"model {copied} is incomplete: its files lack 1 of its weights or hold them in another "
        f"shape, the first {name}; fetch the model again"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, "ZeroDivisionError: "),
        ({"num_attention_heads": 5}, "hidden size is not divi"),
        ({"hidden_size": "wide"}, "Error: "),
        ({"hidden_act": "foo"}, "KeyError: 'foo'"),
        ({"dtype": "float99"}, "float99"),
        ({"model_type": "nope"}, "model type `nope`"),
    ],
)
def test_a_config_that_builds_nothing(copied: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, **change}))
    for attempt in (load, outline):
        with pytest.raises(InputError) as info:
            attempt(copied)
        text = one_line(info)
        assert text.startswith(
            f"the config of model {copied} describes no model that transformers can build: "
        )
        assert message in text


def test_attention_that_does_not_work_names_those_that_do(model_directory: Path) -> None:
    for name in ("fast", "someone/kernel"):
        with pytest.raises(InputError) as info:
            load(model_directory, attention_implementation=name)
        text = one_line(info)
        assert text.startswith(f"--attn-implementation {name} does not work with a model of type ")
        for working in text.rpartition(" here; use ")[2].split(" or "):
            if working == "flex_attention":
                continue  # compiled for a minute at its first pass
            assert load(model_directory, attention_implementation=working).attention_implementation
        assert " here; use eager or sdpa or sdpa_by_blocks" in text


def test_loading_says_nothing_of_its_own(
    model_directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither bars nor reports: a user sees the lines and bars of this package alone."""
    load(model_directory)
    outline(model_directory)
    assert capfd.readouterr() == ("", "")


def test_broken_config(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    with pytest.raises(InputError) as info:
        load(copied)
    assert f"model in {copied} cannot be read" in one_line(info)


def test_code_of_a_repository_is_never_run(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["model_type"] = "foreign"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "code.py").write_text("raise SystemExit('foreign code was run')")
    with pytest.raises(InputError) as info:
        load(copied)
    assert "needs code from its own repository, which this package never runs" in one_line(info)


def test_no_tokenizer(copied: Path) -> None:
    transformer = load(copied)
    with pytest.raises(InputError) as info:
        _ = transformer.tokenizer
    assert f"{copied} holds no tokenizer: expected tokenizer.json" in one_line(info)


@pytest.mark.usefixtures("no_hub")
def test_tokenizer_without_network() -> None:
    with pytest.raises(InputError, match="cannot find tokenizer 'someone/uncached'"):
        load_tokenizer("someone/uncached")


def test_unknown_dtype(model_directory: Path) -> None:
    with pytest.raises(InputError, match="--model-dtype must be auto, float32, float16, bfloat16"):
        load(model_directory, dtype="int8")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ResourceError, match=r"--device cuda was asked for, .* use --device cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("auto") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ResourceError, match=r"--device cuda:2 was asked for, .* 2 CUDA devices"):
        resolve_device("cuda:2")
    for name in ("meta", "gpu"):
        with pytest.raises(InputError, match="--device must be auto, cpu, cuda or cuda:N"):
            resolve_device(name)
