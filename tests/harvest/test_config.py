"""Settings are refused where they are given, and layers are read as people write them."""

from pathlib import Path
from typing import Any

import pytest

from mlsae.base.errors import InputError
from mlsae.harvest import HarvestConfig, parse_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0", (0,)),
        ("0,2,4", (0, 2, 4)),
        ("0-5", (0, 1, 2, 3, 4, 5)),
        ("7, 0-2", (0, 1, 2, 7)),
        ("3-3", (3,)),
    ],
)
def test_layers_are_read(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "-1", "1-", "1,,2", "1-2-3", "0.5"])
def test_text_that_is_no_layers_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected layers such as 0,2,4 or 0-5, got"):
        parse_layers(text)


def test_backward_range_and_repeated_layer_are_refused() -> None:
    with pytest.raises(InputError, match="got the range '5-2'"):
        parse_layers("0,5-2")
    with pytest.raises(InputError, match="expected each layer once, got '0-2,1'"):
        parse_layers("0-2,1")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_tokens": 0}, "--max-tokens must be at least 1, got 0"),
        ({"max_disk": 0}, "--max-disk must be at least 1, got 0"),
        ({"context_length": 1}, "--context-length must be at least 2, got 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"shard_size": 0}, "--shard-size must be at least 1, got 0"),
        ({"encoding": "int4"}, "--encoding must be auto, float16, bfloat16, float32, got 'int4'"),
        ({"model_dtype": "half"}, "--model-dtype must be auto, float32, float16, bfloat16"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as info:
        HarvestConfig(model="m", dataset="d", out=Path("o"), **changes)
    assert text in str(info.value)
