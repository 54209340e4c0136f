"""The cache for Delphi: what its loader relies on, and every event once; see tests/external."""

import errno
import json
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pd
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

from mlsae.analyze import Analysis, AnalyzeConfig, run
from mlsae.analyze.interop.delphi import LayerEvents, check_target, module_name, to_delphi
from mlsae.analyze.interop.delphi_files import Totals, choose_num_splits, count, split, write_module
from mlsae.base.errors import InputError, ResourceError
from mlsae.cli import main
from mlsae.store import PADDING, create, open_store

LAYERS, LENGTH, NUM_LATENTS, COVERED = (0, 1, 3), 24, 48, 20
Event = tuple[int, int, int, np.float16]
"""Sequence, position, latent and value."""


@pytest.fixture(scope="module")
def analysis(
    world: Any, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Analysis:
    """Training's rows, in 30 sequences that are not consecutive; events of the first 20."""
    return run(
        AnalyzeConfig(
            cache=world.store,
            sae=sae_maker(world.store, num_latents=NUM_LATENTS),
            out=tmp_path_factory.mktemp("analysis") / "out",
            rows="train",
            events_max_tokens=COVERED * LENGTH + 5,
            figures=False,
            device="cpu",
        )
    )


@pytest.fixture(scope="module")
def cache(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_delphi(analysis, tmp_path_factory.mktemp("delphi") / "latents").path


def _sequences(analysis: Analysis) -> list[int]:
    """Those with events, in order; here every sequence has some."""
    tokens = analysis.events.to_table(columns=["token"])["token"].to_numpy()
    return sorted(set((tokens // LENGTH).tolist()))


def _events(analysis: Analysis, layer: int) -> Counter[Event]:
    """Events that the cache is to hold for a layer, by a loop over the table."""
    place = {sequence: n for n, sequence in enumerate(_sequences(analysis))}
    table = analysis.events.to_table(filter=pc.field("layer") == layer)
    return Counter(
        (place[e["token"] // LENGTH], e["token"] % LENGTH, e["latent"], np.float16(e["value"]))
        for e in table.to_pylist()
    )


def _read(folder: Path) -> Iterator[tuple[int, int, dict[str, npt.NDArray[Any]]]]:
    """First and last latent and tensors of each file, in the order of latents."""
    for path in sorted(folder.glob("*.safetensors"), key=lambda p: int(p.stem.split("_")[0])):
        start, end = map(int, path.stem.split("_"))
        yield start, end, load_file(path)


def _held(folder: Path) -> Counter[Event]:
    return Counter(
        (row, position, start + latent, value)
        for start, _, data in _read(folder)
        for (row, position, latent), value in zip(
            data["locations"].tolist(), data["activations"], strict=True
        )
    )


def test_every_event_is_there_once_with_its_value(analysis: Analysis, cache: Path) -> None:
    assert sorted(p.name for p in cache.iterdir()) == [f"layers.{n}" for n in LAYERS]
    for layer in LAYERS:
        expected = _events(analysis, layer)
        assert len(expected) > 1000
        assert _held(cache / f"layers.{layer}") == expected


def test_files_are_as_the_writer_of_delphi_makes_them(cache: Path) -> None:
    """Names, types, shapes, and each latent's events in the order of tokens."""
    # `LatentCache._generate_split_indices`.
    borders = torch.linspace(0, NUM_LATENTS, steps=6).long()
    ranges = list(zip(borders[:-1].tolist(), (borders[1:] - 1).tolist(), strict=True))
    for layer in LAYERS:
        files = list(_read(cache / f"layers.{layer}"))
        assert [(start, end) for start, end, _ in files] == ranges
        for start, end, data in files:
            assert {name: tensor.dtype for name, tensor in data.items()} == {
                "locations": np.uint16,
                "activations": np.float16,
                "tokens": np.int64,
            }
            rows, positions, latents = data["locations"].T.astype(np.int64)
            assert data["activations"].shape == rows.shape
            assert len(rows) > 0
            assert latents.max() <= end - start
            # The loader sorts by latent, stably, and takes equal windows that follow as one.
            keys = (latents * COVERED + rows) * LENGTH + positions
            assert (np.diff(keys) > 0).all()


def test_tokens_are_those_that_the_events_cover(
    world: Any, analysis: Analysis, cache: Path
) -> None:
    sequences = _sequences(analysis)
    assert len(sequences) == COVERED < sequences[-1]
    expected = world.tokens.reshape(-1, LENGTH)[sequences]
    for layer in LAYERS:
        for _, _, data in _read(cache / f"layers.{layer}"):
            np.testing.assert_array_equal(data["tokens"], expected)


def test_the_configuration_is_delphis_and_says_where_it_came_from(
    world: Any, analysis: Analysis, cache: Path
) -> None:
    config = json.loads((cache / "layers.3" / "config.json").read_text())
    assert config["mlsae"]["sae_sha256"] == analysis.summary["sae_sha256"]
    assert (config["mlsae"]["store_id"], config["mlsae"]["num_sequences"]) == (
        open_store(world.store).store_id,
        COVERED,
    )
    del config["mlsae"]
    assert config == {
        "dataset_repo": f"mlsae store {open_store(world.store).store_id}",
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "",
        "batch_size": 1,
        "cache_ctx_len": LENGTH,
        "n_tokens": COVERED * LENGTH,
        "n_splits": 5,
        "model_name": str(world.model),
    }


def test_the_order_of_the_events_does_not_matter(
    analysis: Analysis, cache: Path, tmp_path: Path
) -> None:
    """Nor how they lie in files and row groups: the bytes are the same."""
    table = analysis.events.to_table()
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    pd.write_dataset(
        shuffled,
        tmp_path / "events",
        format="parquet",
        max_rows_per_file=999,
        max_rows_per_group=99,
    )
    mixed = replace(analysis, events=pd.dataset(tmp_path / "events", format="parquet"))
    to_delphi(mixed, tmp_path / "out")
    for path in cache.rglob("*.*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(cache)).read_bytes() == path.read_bytes()


def test_what_float16_and_uint16_cannot_hold_is_wider(tmp_path: Path) -> None:
    """A file each of what fits just and what does not, as they are written."""
    tiny, most = 2.0**-24, 65504.0
    narrow = Totals(counts=np.array([2, 1]), smallest=tiny, largest=most)
    wide = replace(narrow, largest=np.nextafter(np.float32(most), np.float32(np.inf)))
    small = replace(narrow, smallest=tiny / 2)
    types = [
        (of.locations.name, of.activations.name)
        for totals, num_sequences, length in (
            (narrow, 65536, 8),
            (wide, 65537, 8),
            (small, 8, 65537),
        )
        for of in split(totals, 1, num_sequences, length)
    ]
    assert types == [("uint16", "float16"), ("uint32", "float32"), ("uint32", "float32")]
    (tmp_path / "tokens").write_bytes(np.arange(65537 * 2).tobytes())
    batch = (
        np.array([65536 * 2 + 1, 7, 9]),
        np.array([0, 1, 0]),
        np.array([1e5, 2.0, 3.0], dtype=np.float32),
    )
    totals = count([batch], 2, lambda _: None)
    (whole,) = split(totals, 1, 65537, 2)
    write_module(tmp_path, totals, [whole], [batch], tmp_path / "tokens", lambda _: None)
    data = load_file(tmp_path / "0_1.safetensors")
    assert data["locations"].tolist() == [[4, 1, 0], [65536, 1, 0], [3, 1, 1]]
    assert data["activations"].tolist() == [3.0, 1e5, 2.0]
    assert data["tokens"].shape == (65537, 2)


@pytest.mark.parametrize(
    ("active", "ranges"),
    [
        ([0, 9], [(0, 7), (8, 9)]),
        ([5], [(0, 9)]),
        ([2, 3, 6], [(0, 5), (6, 9)]),
        ([], [(0, 9)]),
        (list(range(10)), [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]),
    ],
)
def test_no_file_is_without_events(active: list[int], ranges: list[tuple[int, int]]) -> None:
    """A range without is joined to its neighbour; together they are all latents."""
    counts = np.zeros(10, dtype=np.int64)
    counts[active] = 3
    totals = Totals(counts=counts, smallest=1.0, largest=2.0)
    files = split(totals, 5, 4, 8)
    assert sum(of.num_events for of in files) == 3 * len(active)
    assert not active or all(of.num_events for of in files)
    assert [(of.start, of.end) for of in files] == ranges
    assert files[0].start == 0
    assert files[-1].end == 9
    assert all(a.end + 1 == b.start for a, b in pairwise(files))


def test_large_layers_are_cut_finer() -> None:
    def choose(*num_events: int) -> int:
        counts = [np.array([n, *[0] * 99]) for n in num_events]
        return choose_num_splits([Totals(counts=of, smallest=1.0, largest=1.0) for of in counts])

    assert [choose(7), choose(3, 5 * 2**23), choose(2**23 * 5 + 1, 9), choose(2**40)] == [
        5,
        5,
        6,
        100,
    ]


def test_memory_does_not_grow_with_the_events(tmp_path: Path) -> None:
    """Peak of numpy's memory with 2²¹ events and four times as many, one latent to be sorted."""
    (tmp_path / "tokens").write_bytes(b"")

    def batches(num: int) -> Iterator[Any]:
        generator = np.random.default_rng(0)
        for first in reversed(range(0, num, 2**17)):
            places = np.arange(first, first + 2**17)
            latents = generator.integers(0, 50, 2**17)
            yield places, latents, generator.random(2**17, dtype=np.float32) + 0.5

    peaks = []
    for num in (2**21, 2**23):
        totals = count(batches(num), 50, lambda _: None)
        splits = split(totals, 5, num // 64, 64)
        tracemalloc.start()
        write_module(tmp_path, totals, splits, batches(num), tmp_path / "tokens", lambda _: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_reading_the_events_holds_no_whole_file(analysis: Analysis, tmp_path: Path) -> None:
    """A few of 96 row groups, as Arrow chooses; half a file would be 48."""
    generator, num_events = np.random.default_rng(0), 96 << 17
    table = pa.table(
        {
            "token": np.full(num_events, _sequences(analysis)[0] * LENGTH),
            "layer": np.zeros(num_events, np.int32),
            "latent": generator.integers(0, NUM_LATENTS, num_events, np.int32),
            "value": generator.random(num_events, np.float32),
        }
    )
    path = tmp_path / "events.parquet"
    pq.write_table(table, path, row_group_size=1 << 17)
    del table
    large = replace(analysis, events=pd.dataset(path))
    events = LayerEvents(analysis=large, layer=0, sequences=np.array(_sequences(analysis)))
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in events)
    assert most < path.stat().st_size / 2


def test_the_command_writes_it_beside_the_analysis(
    harvested: Callable[..., Path], sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """And says which tokens it covers, and that examples of 32 tokens do not fit."""
    store = harvested()
    command = ["analyze", "--cache", str(store), "--sae", str(sae_maker(store)), "--rows", "all"]
    command += [
        "--no-figures",
        "--out",
        str(tmp_path / "analysis"),
        "--to-delphi",
        str(tmp_path / "latents"),
    ]
    (tmp_path / "latents").mkdir()
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "latents").iterdir()) == ["layers.0", "layers.2"]
    assert f"delphi    {tmp_path / 'latents'} (2 modules, " in done.output
    assert "events of the 480 tokens that the table `events` covers)" in done.output
    assert (
        "note: Delphi cuts sequences into examples of 32 tokens, which does not divide 24: give it "
        "ConstructorConfig(example_ctx_len=24)"
    ) in done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["analysis", "latents"]


def test_padding_and_an_unknown_transformer_are_noted_and_ours_is_replaced(
    sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    flags = np.zeros(96, np.uint8)
    flags[-9:] = PADDING
    store = _random_store(tmp_path / "acts", context_length=32, token_flags=flags)
    analysis = _analyze(store, sae_maker, tmp_path / "out")
    cache = to_delphi(analysis, tmp_path / "latents")
    assert list(cache.notes) == [
        "9 of 96 tokens are padding, which Delphi may show as text where a latent is inactive",
        "where the transformer lay is not known: give Delphi's loader a tokenizer",
    ]
    assert json.loads((cache.path / "layers.0" / "config.json").read_text())["model_name"] == ""
    (cache.path / "layers.0" / "48_60.safetensors").write_text("of before")
    named = to_delphi(tmp_path / "out", tmp_path / "latents", model="owner/name")
    assert not (cache.path / "layers.0" / "48_60.safetensors").exists()
    assert len(named.notes) == 1
    config = json.loads((named.path / "layers.0" / "config.json").read_text())
    assert config["model_name"] == "owner/name"


def test_modules_are_named_as_those_of_most_transformers() -> None:
    assert module_name("resid_post", 3) == "layers.3"
    assert module_name("mlp_out", 0) == "layers.0.mlp"
    assert module_name("resid_mid", 11) == "layers.11.resid_mid"


def test_a_store_of_some_positions_is_refused_before_any_work(
    sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    store = _random_store(tmp_path / "acts", context_length=32, keep_positions=4)
    config = _config(store, sae_maker, tmp_path / "out", to_delphi=tmp_path / "latents")
    with pytest.raises(
        InputError, match=r"--to-delphi: .*acts keeps 4 of the 32 positions of each "
    ):
        run(config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["acts"]


def test_other_things_are_not_replaced(cache: Path, world: Any, tmp_path: Path) -> None:
    store = open_store(world.store)
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for name in ("theirs", "mixed"):
        (tmp_path / name / "layers.0").mkdir(parents=True)
    (tmp_path / "theirs" / "layers.0" / "config.json").write_text('{"model_name": "m"}')
    ours = (cache / "layers.0" / "config.json").read_text()
    (tmp_path / "mixed" / "layers.0" / "config.json").write_text(ours)
    check_target(tmp_path / "mixed", store)
    (tmp_path / "mixed" / "layers.0" / "notes.md").write_text("")
    for name, message in (
        ("file", "--to-delphi .*/file is a file; give a directory"),
        ("other", "holds thesis.tex, which is no module of a cache that mlsae wrote: give a "),
        ("theirs", "holds layers.0, which is no module of a cache that mlsae wrote"),
        ("mixed", "holds layers.0, which is no module of a cache that mlsae wrote"),
    ):
        with pytest.raises(InputError, match=message):
            check_target(tmp_path / name, store)
    for out in ("a", "a/b", "."):
        with pytest.raises(InputError, match="lie in one another: give directories beside each "):
            check_target(tmp_path / out, store, analysis=tmp_path / "a")
    check_target(tmp_path / "b", store, analysis=tmp_path / "a")


def test_another_store_and_foreign_events_are_refused(analysis: Analysis, tmp_path: Path) -> None:
    other = open_store(_random_store(tmp_path / "acts", context_length=32))
    with pytest.raises(InputError, match=r"is not the store that .* was made from: "):
        to_delphi(analysis, tmp_path / "latents", store=other)
    fewer = replace(analysis, summary={**analysis.summary, "events_max_tokens": 5 * LENGTH})
    with pytest.raises(InputError, match=r"is damaged: token .* is none of those that it covers; "):
        to_delphi(fewer, tmp_path / "latents")
    none = replace(analysis, summary={**analysis.summary, "events_max_tokens": LENGTH - 1})
    with pytest.raises(
        InputError, match=r"covers 0 tokens, expected at least a sequence, 24, and "
    ):
        to_delphi(none, tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


def test_too_little_disk_is_said_with_numbers_and_leaves_nothing(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlsae.base.machine.resources.free_disk", lambda _: 5000)
    with pytest.raises(
        ResourceError,
        match=r"not enough disk for the cache for Delphi at .*: needs .*, .* free; the analysis .* "
        r"is done: free some space and call mlsae.analyze.to_delphi, or analyze again",
    ):
        to_delphi(analysis, tmp_path / "latents")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Met where the room for a layer's events is taken, when the tokens are written."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(ResourceError, match=r"the disk is full: .*latents could not be written; "):
        to_delphi(analysis, tmp_path / "deep" / "latents")
    assert list(tmp_path.iterdir()) == []


def _random_store(path: Path, context_length: int, **settings: Any) -> Path:
    num_sequences = 3
    kept = settings.get("keep_positions", context_length)
    values = np.random.default_rng(0).normal(size=(num_sequences * kept, 4)).astype(np.float32)
    with create(
        path,
        tokens=np.arange(num_sequences * context_length),
        context_length=context_length,
        layers=(0,),
        d_model=4,
        **settings,
    ) as writer:
        writer.append({("resid_post", 0): values})
    return path


def _config(
    store: Path, sae_maker: Callable[..., Path], out: Path, **settings: Any
) -> AnalyzeConfig:
    return AnalyzeConfig(
        cache=store,
        sae=sae_maker(store),
        out=out,
        rows="all",
        device="cpu",
        figures=False,
        **settings,
    )


def _analyze(store: Path, sae_maker: Callable[..., Path], out: Path) -> Analysis:
    return run(_config(store, sae_maker, out))
