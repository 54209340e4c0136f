"""Weights spread over devices, memory and disk are the same weights and give the same numbers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload

from mlsae.base.errors import InputError, ResourceError
from mlsae.models import INITS, Inputs, Transformer, load, load_for
from mlsae.models.capture import capture
from mlsae.models.weights.placement import full_memory_explained

INPUTS = Inputs(tokens=torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(2)))


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def directory(request: pytest.FixtureRequest, make_model_directory: Callable[[str], Path]) -> Path:
    """Weights of their own in embedding and head, and tied ones."""
    return make_model_directory(request.param)


def same(one: Transformer, other: Transformer) -> None:
    """Equal records; equal activations of every layer, bit for bit."""
    assert other.describe() == one.describe()
    expected, found = (capture(model, INPUTS, range(4)) for model in (one, other))
    for key, value in expected.items():
        assert torch.equal(found[key].cpu(), value.cpu()), key


def is_offloaded(transformer: Transformer) -> bool:
    return all(p.device.type == "meta" for p in transformer.blocks[-1].parameters())


def test_offloaded_to_memory(directory: Path) -> None:
    plain, spread = load(directory), load(directory)
    cpu_offload(spread.model, torch.device("cpu"))
    assert is_offloaded(spread)
    assert spread.device == torch.device("cpu")
    same(plain, spread)


@pytest.mark.parametrize("init", ["rerandomized", "control"])
def test_offloaded_to_disk(directory: Path, tmp_path: Path, init: str) -> None:
    plain, spread = (load(directory, init=init, init_seed=2) for _ in range(2))
    disk_offload(spread.model, tmp_path / "offload", torch.device("cpu"))
    assert is_offloaded(spread)
    assert spread.device == torch.device("cpu")
    same(plain, spread)


def test_the_librarys_own_map_over_memory_and_disk(directory: Path) -> None:
    """Placement as by `--device-map auto`, with less memory than the model takes."""
    plain = load(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, device_map="auto", max_memory={"cpu": 60_000}
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    backbone = model.base_model
    spread = replace(plain, model=model.eval(), blocks=list(backbone.layers))
    assert is_offloaded(spread)
    same(plain, spread)


@pytest.mark.parametrize("init", INITS)
def test_device_map_auto(directory: Path, init: str) -> None:
    """On a machine without a GPU: all in memory; with them: on them."""
    plain = load(directory, init=init, init_seed=2)
    spread = load(directory, init=init, init_seed=2, device_map="auto")
    assert spread.describe() == plain.describe()
    assert load_for(plain.describe(), directory, device_map="auto").describe() == plain.describe()
    assert spread.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    if spread.device.type == "cpu":
        same(plain, spread)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("init", ["trained", "rerandomized"])
def test_device_map_auto_leaves_in_memory_what_the_gpu_lacks_room_for(
    tmp_path: Path, init: str
) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=1024, num_hidden_layers=8, num_attention_heads=4,
        intermediate_size=4096, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    plain = load(tmp_path, init=init)
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 300_000_000, dtype=torch.uint8, device="cuda")
    spread = load(tmp_path, init=init, device_map="auto")
    assert {"cpu", 0} <= set(spread.model.hf_device_map.values())
    assert spread.describe() == plain.describe()
    last = ("resid_post", 7)
    tokens = Inputs(tokens=INPUTS.tokens)
    expected, found = (capture(model, tokens, [7])[last].cpu() for model in (plain, spread))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    del hog


def test_other_device_maps_are_refused(directory: Path) -> None:
    with pytest.raises(InputError) as info:
        load(directory, device_map="balanced")
    assert str(info.value) == "--device-map must be auto, got 'balanced'"


@pytest.mark.parametrize("init", ["trained", "random"])
def test_a_model_larger_than_memory_is_refused_before_it_is_read(
    directory: Path, tmp_path: Path, init: str
) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_size": 1 << 16, "intermediate_size": 1 << 20, "num_hidden_layers": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ResourceError) as info:
        load(tmp_path, init=init)
    text = str(info.value)
    assert text.startswith(f"not enough memory for the weights of {tmp_path}: needs ")
    assert " TB, " in text
    assert text.endswith("use a smaller --model-dtype, --device-map auto or a smaller model")


def test_a_full_device_is_one_line() -> None:
    """A full GPU raises this very error; torch's text names the GPU and the bytes."""
    with (
        pytest.raises(ResourceError) as info,
        full_memory_explained("some/model", "on cuda:0", "--device-map auto, another --device"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert str(info.value) == (
        "not enough memory on cuda:0 for the weights of some/model; use --device-map auto, another "
        "--device or a smaller --model-dtype"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_full_is_refused(directory: Path) -> None:
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 1_000_000, dtype=torch.uint8, device="cuda")
    with pytest.raises(ResourceError, match="not enough memory on cuda for the weights of"):
        load(directory, device="cuda")
    del hog
