"""Events go on with the settings that decide their bytes, and with no others."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mlsae.analyze import EventsConfig, load_events, run_events
from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed, seal, sha256_file
from mlsae.base.settings import deciding

CHANGES: dict[str, Any] = {
    "rows": "train",
    "max_tokens": 48,
    "batch_size": 51,
    "part_events": 90,
}
"""Deciding setting → another value; store, SAE and device are changed in the tests."""


@pytest.fixture(scope="module")
def written(
    harvested: Callable[..., Path],
    sae_maker: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> EventsConfig:
    """Events of a small store, complete; tests write nothing there."""
    store, out = harvested(), tmp_path_factory.mktemp("written") / "events"
    config = EventsConfig(cache=store, sae=sae_maker(store), out=out, rows="all", device="cpu")
    run_events(config)
    return config


@pytest.mark.parametrize("name", deciding(EventsConfig))
def test_another_value_of_a_deciding_setting_is_refused(
    name: str,
    written: EventsConfig,
    harvested: Callable[..., Path],
    sae_maker: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The message names the setting, or what it is resolved to."""
    if name == "device":
        plan = read_sealed(written.out / "events.json")
        there = tmp_path / "events"
        there.mkdir()
        others = {key: value for key, value in plan.items() if key != "sha256"}
        (there / "events.json").write_bytes(seal({**others, "device": "cuda"}))
        with pytest.raises(InputError, match="begun with other settings: device is cuda there, cp"):
            run_events(replace(written, out=there))
        return
    if name == "cache":
        change, named = harvested(max_tokens=9 * 24), "store_id"
    elif name == "sae":
        change, named = sae_maker(written.cache, seed=1), "sae_sha256"
    else:
        change, named = CHANGES[name], name
    with pytest.raises(InputError, match=f"begun with other settings: .*{named} is .* there, "):
        run_events(replace(written, **{name: change}))


def test_other_settings_are_in_no_plan(written: EventsConfig, tmp_path: Path) -> None:
    """Those that say where parts of remote stores are kept."""
    others = {"cache_dir": tmp_path, "cache_size": 10**6}
    assert not {*others} & {*deciding(EventsConfig)}
    run_events(replace(written, **others))


def test_the_plan_has_the_keys_that_it_had(written: EventsConfig) -> None:
    """Directories of earlier versions are continued."""
    assert {*read_sealed(written.out / "events.json")} - {"sha256"} == {
        *("kind", "tables_version", "cache", "sae", "stores", "site", "layers", "num_latents"),
        *("skip_positions", "context_length", "rows_per_sequence", "rows", "max_tokens"),
        *("batch_size", "part_events", "device", "num_sequences", "num_parts", "notes"),
        *("store_id", "plan_id", "sae_sha256"),
    }


def test_the_folder_is_a_table_to_other_readers(written: EventsConfig) -> None:
    """`layer` is a column of the files, and no reader takes it from the names of folders too."""
    expected = load_events(written.out).events.count_rows()
    folder = written.out / "events"
    found = pq.read_table(folder)
    assert found.num_rows == expected
    assert found.column_names == ["row", "token", "layer", "latent", "value"]
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = pandas.read_parquet(folder)
    assert len(frame) == expected
    some = pandas.read_parquet(folder, filters=[("layer", "==", 2)])
    assert len(some) == (frame["layer"] == 2).sum() > 0


def test_folders_of_earlier_versions_are_read(written: EventsConfig, tmp_path: Path) -> None:
    """They were called `layer=<l>`; the records name them so."""
    out = tmp_path / "events"
    shutil.copytree(written.out, out)
    for folder in [*out.glob("*/layer-*")]:
        folder.rename(folder.with_name(folder.name.replace("-", "=")))
    for path in out.rglob("*.json"):
        text = json.dumps(read_sealed(path)).replace("layer-", "layer=")
        path.write_bytes(seal(json.loads(text)))
    _renew_plan(out)
    there, here = (load_events(at).events for at in (out, written.out))
    assert there.to_table().equals(here.to_table())
    layer = pc.field("layer") == 2
    assert there.to_table(filter=layer).equals(here.to_table(filter=layer))


def _renew_plan(out: Path) -> None:
    """Name the plan's new hash where it is recorded."""
    digest = sha256_file(out / "events.json")
    for path in out.rglob("*.json"):
        content = read_sealed(path)
        if "plan" in content:
            path.write_bytes(seal({**content, "plan": digest}))
