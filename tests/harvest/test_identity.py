"""Settings that decide the values of a harvest are in the store's plan, as given or by hash."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsae.base.settings import deciding, described
from mlsae.harvest import HarvestConfig, run
from mlsae.store import open_store
from mlsae.store.format.layout import SHARD_BYTES

CHANGES: dict[str, dict[str, Any]] = {
    "init": {"init": "random"},
    "init_seed": {"init_seed": 1},
    "split": {"split": "test"},
    "subset": {"subset": "held"},
    "shuffle_seed": {"shuffle_seed": 1},
    "text_column": {"text_column": "other"},
    "tokens_column": {"tokens_column": "ids"},
    "max_tokens": {"max_tokens": 32},
    "context_length": {"context_length": 12},
    "packing": {"packing": "document"},
    "bos": {"bos": "never"},
    "isolate_documents": {"isolate_documents": True},
    "layers": {"layers": (1,)},
    "sites": {"sites": ("mlp_out",)},
    "keep_positions": {"keep_positions": 4},
    "keep_seed": {"keep_seed": 1},
    "encoding": {"encoding": "float32"},
    "model_dtype": {"model_dtype": "bfloat16"},
    "attention_implementation": {"attention_implementation": "eager"},
    "batch_size": {"batch_size": 2},
    "shard_size": {"shard_size": 3000},
}
"""Deciding setting → another value; the settings before are `basis` with those of `BEFORE`."""
BEFORE: dict[str, dict[str, Any]] = {
    "init_seed": {"init": "random"},
    "subset": {"subset": "all"},
    "keep_seed": {"keep_positions": 4},
}
NAMES_ONLY = {
    "tokenizer": "names a directory, whose tokenizer is hashed: tests/models",
    "revision": "names a commit of a hub model, whose weights are hashed: tests/models",
    "blocks": "names the blocks where they are not found, and sites of others have another hash",
}
"""Deciding settings that say where something is, which is then hashed itself."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in hub layout with two splits, two subsets and three columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory = tmp_path_factory.mktemp("text")
    (directory / "data").mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        draw = generator.integers(0, 50, (8, 9))
        words = [" ".join(f"w{i}" for i in row) for row in draw]
        columns = {"text": words, "other": words[::-1], "ids": (draw // 2).tolist()}
        pq.write_table(pa.table(columns), directory / f"data/{split}-00000-of-00001.parquet")
    (directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  default: true\n  data_files:\n"
        "  - split: train\n    path: data/train-*\n  - split: test\n    path: data/test-*\n"
        "- config_name: held\n  data_files: data/test-*\n---\n"
    )
    return directory


@pytest.fixture(scope="module")
def identity(
    model_maker: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """Plan of the store that a small harvest makes; each is made once."""
    model = model_maker(bos=True, adds_bos=True)
    known: dict[str, dict[str, Any]] = {}

    def make(**changes: Any) -> dict[str, Any]:
        key = json.dumps(changes, default=str)
        if key not in known:
            out = tmp_path_factory.mktemp("acts") / "store"
            settings = {
                "model": str(model), "dataset": str(text), "context_length": 16, "batch_size": 3,
                "device": "cpu", "layers": (0, 2), "shard_size": 12_000,
            }  # fmt: skip
            run(HarvestConfig(out=out, **{**settings, **changes}))
            known[key] = open_store(out).plan.to_json()
            shutil.rmtree(out)
        return known[key]

    return make


@pytest.mark.parametrize("name", deciding(HarvestConfig))
def test_a_deciding_setting_is_in_the_plan(
    name: str,
    identity: Callable[..., dict[str, Any]],
    model_maker: Callable[..., Path],
    dataset: Path,
) -> None:
    """Another value is another plan, which a store is not continued with."""
    if name in NAMES_ONLY:
        assert len(NAMES_ONLY[name].split()) > 3
        return
    others = {
        "model": lambda: {"model": str(model_maker(scale=2.0))},
        "tokenizer": lambda: {"tokenizer": str(model_maker())},
        "dataset": lambda: {"dataset": str(dataset)},
    }
    change = others[name]() if name in others else CHANGES[name]
    before = BEFORE.get(name, {})
    assert identity(**{**before, **change}) != identity(**before)


def test_other_settings_are_in_no_plan(identity: Callable[..., dict[str, Any]]) -> None:
    """Limits that change no value."""
    limits = {"max_encoding_fvu": 0.5, "max_disk": 10**9, "allow_mixed_hardware": True}
    assert not any(described(HarvestConfig)[name].decides for name in limits)
    assert identity(**limits) == identity()


def test_a_small_harvest_has_enough_shards_and_an_earlier_one_goes_on_as_it_was(
    config: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stores begun before were cut by bytes alone; their plan is not another one now."""
    monkeypatch.setattr("mlsae.store.format.layout.SMALL_SHARD_BYTES", 1000)
    monkeypatch.setattr("mlsae.store.format.layout.SMALL_SHARD_ROWS", 16)
    settings = config(out=tmp_path / "new", shard_size=None, layers=(1,))
    run(settings)
    assert 16 <= open_store(settings.out).plan.num_shards <= 32
    former = config(out=tmp_path / "old", shard_size=SHARD_BYTES, layers=(1,))
    before = run(former)
    again = run(replace(former, shard_size=None))
    assert before is not None
    assert again is not None
    assert (again.store_id, again.bytes_written) == (before.store_id, 0)
    assert open_store(former.out).plan.num_shards == 1
