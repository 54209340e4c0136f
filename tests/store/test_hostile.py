"""Stores from strangers: what they say is held against what is there, and they are only read."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed, seal
from mlsae.store import DamagedStoreError, InvalidStoreError, open_store
from mlsae.store.format.layout import plan_layout
from mlsae.store.format.moments import GroupMoments, to_bytes
from mlsae.store.format.positions import check_num_positions
from mlsae.store.plancheck import check_plan
from mlsae.store.tools.info import store_info
from mlsae.store.tools.verify import verify
from mlsae.store.write.plan import make_plan
from mlsae.store.write.tokens import TokenArrays


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_link_to_nowhere(path: Path) -> None:
    path.symlink_to("gone")


@pytest.mark.parametrize("harm", [as_pipe, as_endless, as_loop, as_link_to_nowhere, Path.mkdir])
def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(
    sample, harm: Callable[[Path], None]
):
    names = [
        "plan.json",
        "complete.json",
        "moments.safetensors",
        "commits/00001.json",
        "tokens/c.0",
        "activations/resid_post/1/c.0.0",
        "activations/resid_post/1/zarr.json",
    ]
    if harm != Path.mkdir:  # A folder more is no object.
        names.append("provenance/run.json")
    (sample.path / "provenance/run.json").write_bytes(seal({"started": "2000"}))
    for name in names:
        aside = (sample.path / name).rename(sample.path.parent / "aside")
        harm(sample.path / name)
        try:
            problems = [str(problem) for problem in verify(sample.path).problems]
        except InputError as error:
            problems = [str(error)]
        # Where a link leads nowhere, the record that completes the store is not there.
        assert any(name in text or "is incomplete" in text for text in problems), (name, problems)
        if harm == Path.mkdir:
            (sample.path / name).rmdir()
        aside.replace(sample.path / name)
    assert verify(sample.path).problems == []


def test_a_file_in_a_folders_place_is_a_missing_object(sample):
    for file in (sample.path / "tokens").iterdir():
        file.unlink()
    (sample.path / "tokens").rmdir()
    (sample.path / "tokens").write_text("no folder")
    with pytest.raises(DamagedStoreError, match=r"tokens/zarr\.json is missing or damaged"):
        open_store(sample.path)


@pytest.mark.parametrize("description", [b"null", b" " * 100_000], ids=["other", "too long"])
def test_a_folder_in_an_objects_place_does_not_hide_what_else_is_wrong(sample, description: bytes):
    """Nor does an array whose description is damaged."""
    shard = sample.path / "activations/resid_post/1/c.0.0"
    shard.unlink()
    shard.mkdir()
    (shard.parent / "zarr.json").write_bytes(description)
    setup = read_sealed(sample.path / "commits/setup.json")
    name = "activations/resid_post/1/zarr.json"
    setup["metadata"][name] = hashlib.sha256(description).hexdigest()
    (sample.path / "commits/setup.json").write_bytes(seal(setup))
    (sample.path / "activations/resid_post/0/c.0.0").unlink()
    named = {problem.path for problem in verify(sample.path).problems}
    assert {name, f"{shard.parent.relative_to(sample.path)}/c.0.0"} <= named
    assert "activations/resid_post/0/c.0.0" in named


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff" * 8, id="header of 2**64 bytes"),
        pytest.param(b"\x04" + bytes(7) + b"null", id="header without tensors"),
    ],
)
def test_moments_that_are_none_are_refused(sample, data: bytes):
    """Under the right hash, as a hostile hand has it."""
    data += bytes(200_000)
    rewrite_moments(sample.path, data)
    with pytest.raises(InvalidStoreError, match="does not hold this store's moments"):
        open_store(sample.path).moments()
    assert [problem.rule for problem in verify(sample.path).problems] == ["R-MOMENT-1"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_refused(sample, value: float):
    moments = GroupMoments((0, 1, 3), 20)
    moments.norm_sum_LG[0, 0] = value
    rewrite_moments(sample.path, to_bytes({"resid_post": moments}))
    with pytest.raises(InvalidStoreError, match="negative counts, or values that are not finite"):
        open_store(sample.path).moments()


def test_counts_below_zero_are_refused(sample):
    """Two groups of −1 and 1 rows would be divided by their sum."""
    moments = GroupMoments((0, 1, 3), 20)
    moments.count_G[-2:] = [-1, 1]
    rewrite_moments(sample.path, to_bytes({"resid_post": moments}))
    with pytest.raises(InvalidStoreError, match="negative counts, or values that are not finite"):
        open_store(sample.path).moments()


def rewrite_moments(path: Path, data: bytes) -> None:
    """The store's moments, and the record that vouches for them."""
    (path / "moments.safetensors").write_bytes(data)
    record = read_sealed(path / "complete.json")
    record["moments_sha256"] = hashlib.sha256(data).hexdigest()
    (path / "complete.json").write_bytes(seal(record))


@pytest.mark.parametrize(
    "model", ["a name", 7, None, {}, {"name": None}, {"name": ["a"]}], ids=repr
)
def test_info_takes_whatever_a_producer_recorded(sample, model: object):
    (sample.path / "provenance/run.json").write_bytes(seal({"model": model}))
    assert "  model       (not recorded)\n" in str(store_info(sample.path))


def plan_of(**changes: Any) -> dict[str, Any]:
    """The plan of a small store, changed."""
    arrays = TokenArrays(np.arange(48), None, None, 8)
    plan = make_plan(
        arrays,
        context_length=8,
        layers=[0],
        d_model=4,
        sites=["resid_post"],
        encoding="float16",
        batch_sequences=1,
        shard_bytes=64,
        source={},
    )
    return plan.to_json() | changes


def test_a_plan_has_no_more_layers_than_a_folder_holds():
    """Metadata would be made for each of them before anything else is looked at."""
    check_plan(plan_of(layers=list(range(999))), "acts")
    with pytest.raises(InvalidStoreError, match=r"layers must be at most 999, got \[0, 1") as found:
        check_plan(plan_of(layers=list(range(1000))), "acts")
    assert found.value.rule == "R-PLAN-7"


def test_moments_that_no_object_could_hold_are_refused():
    sites = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
    with pytest.raises(InvalidStoreError, match="so that moments take at most 5000000000 bytes"):
        check_plan(plan_of(layers=list(range(999)), sites=sites, d_model=4096), "acts")


def test_positions_are_not_kept_of_a_sequence_longer_than_memory():
    """Choosing them takes a table of the sequence."""
    changes = {"num_tokens": 10**12, "context_length": 10**12, "batch_sequences": 1}
    keep = {"num": 24, "seed": 0}
    plan = plan_of(**changes, keep_positions=keep, shard_rows=24, chunk_rows=24)
    with pytest.raises(
        InvalidStoreError, match="context_length must be at most 16777216 with keep_positions"
    ) as found:
        check_plan(plan, "acts")
    assert found.value.rule == "R-ROW-1"


def test_no_writer_begins_what_no_reader_would_open():
    """Writers refuse at the limits of readers, before anything is written."""
    wide = {"layers": range(900), "sites": ("resid_pre", "resid_post"), "d_model": 8192}
    with pytest.raises(InputError, match=r"the moments of 1,800 arrays, .* would take 9\.44 G"):
        plan_layout(num_tokens=64, context_length=8, encoding="float16", batch_sequences=1, **wide)
    with pytest.raises(InputError, match="a context length of at most 16777216, got 16777217"):
        check_num_positions(1, 2**24 + 1)


@pytest.mark.parametrize(
    "added_fvu",
    [
        {"resid_post": []},
        {"resid_post": {"first": {"num_rows": 1, "total": 0.5, "by_decile": []}}},
        {"resid_post": {"0": {"num_rows": 1, "total": 0.5}}},
        {"resid_post": {"0": {"num_rows": 1, "total": "0.5", "by_decile": []}}},
        {"resid_post": {"0": {"num_rows": 1, "total": 10**400, "by_decile": []}}},
        {"resid_post": {"0": {"num_rows": 1, "total": None, "by_decile": {}}}},
    ],
    ids=str,
)
def test_what_an_encoding_cost_is_a_number_or_nothing(sample, added_fvu: dict[str, Any]):
    """Whoever shows it and whoever verifies it agree."""
    name = sample.path / "commits/00001.json"
    name.write_bytes(seal({**read_sealed(name), "added_fvu": added_fvu}))
    message = (
        "commits/00001.json: added_fvu must be null or map sites and layers to num_rows, total"
    )
    with pytest.raises(InvalidStoreError, match=message):
        store_info(sample.path)
    problems = verify(sample.path).problems
    assert [problem.rule for problem in problems] == ["R-COMMIT-2"]
