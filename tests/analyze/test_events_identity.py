"""Events go on with the settings that decide their bytes, and with no others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlsae.analyze import EventsConfig, run_events
from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed, seal
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
