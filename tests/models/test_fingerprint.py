"""The fingerprint names the weights: all of them, their shapes and their precision."""

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from mlsae.models import load
from mlsae.models.weights.fingerprint import config_sha256, weights_sha256


def test_equals_the_hash_written_out_for_one_small_module() -> None:
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, -2.0]]))
        module.bias.fill_(0.5)
    expected = hashlib.sha256(
        b'["bias",[1],"float32"]' + bytes.fromhex("0000003f")
        + b'["weight",[1,2],"float32"]' + bytes.fromhex("0000803f000000c0")
    ).hexdigest()  # fmt: skip
    assert weights_sha256(module) == expected


def test_one_changed_bit_changes_it(model_directory: Path) -> None:
    transformer = load(model_directory)
    before = weights_sha256(transformer.model)
    assert before == load(model_directory).fingerprint()
    parameter = list(transformer.model.parameters())[-1]
    with torch.no_grad():
        parameter.view(torch.int32).reshape(-1)[-1] ^= 1
    assert weights_sha256(transformer.model) != before


def test_precision_changes_it_but_not_the_config_hash(model_directory: Path) -> None:
    models = [load(model_directory, dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert len({model.fingerprint() for model in models}) == 2
    assert len({model.config_hash for model in models}) == 1


def test_config_hash_is_of_the_architecture_not_of_where_it_was_read(
    model_directory: Path, tmp_path: Path
) -> None:
    config = load(model_directory).model.config
    content = json.loads((model_directory / "config.json").read_text())
    content["transformers_version"] = "4.0.0"
    (tmp_path / "config.json").write_text(json.dumps(content))
    moved = type(config).from_pretrained(tmp_path)
    assert config_sha256(moved) == config_sha256(config)
    moved.initializer_range = 0.5
    assert config_sha256(moved) != config_sha256(config)
