"""Settings are refused where they are given."""

from pathlib import Path
from typing import Any

import pytest

from mlsae.base.errors import InputError
from mlsae.harvest import HarvestConfig


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_tokens": 0}, "--max-tokens must be at least 1, got 0"),
        ({"max_disk": 0}, "--max-disk must be at least 1, got 0"),
        ({"context_length": 1}, "--context-length must be at least 2, got 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"shard_size": 0}, "--shard-size must be at least 1, got 0"),
        (
            {"encoding": "int4"},
            "--encoding must be auto, float16, bfloat16, float32, int8, float16-zstd, "
            "bfloat16-zstd, float32-zstd, int8-zstd, got 'int4'",
        ),
        ({"max_encoding_fvu": 0.0}, "--max-encoding-fvu must be above 0, got 0.0"),
        ({"max_encoding_fvu": float("nan")}, "--max-encoding-fvu must be above 0, got nan"),
        ({"model_dtype": "half"}, "--model-dtype must be auto, float32, float16, bfloat16"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as info:
        HarvestConfig(model="m", dataset="d", out=Path("o"), **changes)
    assert text in str(info.value)
