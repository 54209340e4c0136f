"""Stores are complete or visibly incomplete; producers may die at any moment."""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mlsae.base.errors import InputError, ResourceError
from mlsae.base.files import open_partial
from mlsae.base.machine.priority import NICENESS
from mlsae.store import (
    ActivationError,
    IncompleteStoreError,
    NotAStoreError,
    PlanMismatchError,
    create,
    open_store,
    resume,
)
from mlsae.store.format.accumulate import Accumulator
from mlsae.store.format.encoding import SiteCodec
from mlsae.store.format.moments import GroupMoments
from mlsae.store.tools.verify import verify
from mlsae.store.write.shardfile import ShardFile

PRODUCER = Path(__file__).with_name("producer.py")
SHAPE = {"context_length": 8, "layers": (0, 1), "d_model": 4}
TOKENS = np.arange(64)


def rows(num_rows: int, value: float = 1.0) -> dict[tuple[str, int], np.ndarray]:
    """One batch for the store of SHAPE."""
    values = np.full((num_rows, 4), value, np.float32) + np.arange(4, dtype=np.float32)
    return {("resid_post", 0): values, ("resid_post", 1): 2 * values}


def run_producer(path: Path, kill_after: int | None = None) -> int:
    """Run the producer; kill -9 it when it has printed that many batches. Batches printed."""
    with subprocess.Popen(
        [sys.executable, str(PRODUCER), str(path), "7"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        count = 0
        for _ in process.stdout:
            count += 1
            if count == kill_after:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    assert (process.returncode == 0) == (kill_after is None)
    return count


def test_killed_producers_continue_after_their_last_committed_shard(tmp_path: Path):
    """kill -9 at several instants; each rerun does the rest, and the result is as if unbroken."""
    num_batches = run_producer(tmp_path / "unbroken")
    unbroken = open_store(tmp_path / "unbroken").store_id
    broken = tmp_path / "broken"
    generator = random.Random(0)
    total = 0
    for _ in range(4):
        total += run_producer(broken, kill_after=generator.randint(3, 15))
        with pytest.raises(IncompleteStoreError, match=r"incomplete: \d+ of 40 shards"):
            open_store(broken)
    done = 40 - len(resume(broken).pending())
    assert done > 0
    assert run_producer(broken) == num_batches - 2 * done
    assert open_store(broken).store_id == unbroken
    assert verify(broken).problems == []
    assert not list(broken.rglob("*.partial"))


def test_appending_in_pieces_of_any_size_gives_the_same_store(tmp_path: Path):
    """Rows may come in any portions; shards are cut by the plan."""
    ids = set()
    for piece in (1, 5, 8, 64):
        with create(tmp_path / str(piece), tokens=TOKENS, **SHAPE, shard_bytes=200) as writer:
            for start in range(0, 64, piece):
                writer.append(rows(min(piece, 64 - start)))
        ids.add(open_store(tmp_path / str(piece)).store_id)
    assert len(ids) == 1


def test_two_writers_may_share_a_plan_and_split_the_shards(tmp_path: Path):
    """Each takes every other shard; whoever closes last completes the store."""
    first = create(tmp_path / "a", tokens=TOKENS, **SHAPE, shard_bytes=64)
    second = create(tmp_path / "a", tokens=TOKENS, **SHAPE, shard_bytes=64)
    assert first.num_shards == 8
    for writer, mine in ((first, range(0, 8, 2)), (second, range(1, 8, 2))):
        for shard in mine:
            writer.seek(shard)
            writer.append(rows(8))
    first.close()
    second.close()
    assert verify(tmp_path / "a").problems == []
    with create(tmp_path / "a", tokens=TOKENS, **SHAPE, shard_bytes=64) as again:
        assert again.position is None
        with pytest.raises(InputError, match="has all 64 rows, 1 too many"):
            again.append(rows(1))


def test_another_plan_is_refused_naming_the_difference(tmp_path: Path):
    """The store of another text, layer set or source is not touched."""
    with create(tmp_path / "a", tokens=TOKENS, **SHAPE, source={"model": {"name": "x"}}) as writer:
        writer.append(rows(64))
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    with pytest.raises(PlanMismatchError, match=r"source\.model\.name: x there, y here"):
        create(tmp_path / "a", tokens=TOKENS, **SHAPE, source={"model": {"name": "y"}})
    with pytest.raises(PlanMismatchError, match=r"tokens_sha256: .* there, .* here"):
        create(tmp_path / "a", tokens=TOKENS + 1, **SHAPE, source={"model": {"name": "x"}})
    assert before == {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}


def test_a_directory_with_other_things_is_refused(tmp_path: Path):
    """A store is made in an absent or empty directory only."""
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(NotAStoreError, match=r"is not empty and holds no store.*thesis\.tex"):
        create(tmp_path, tokens=TOKENS, **SHAPE)
    with pytest.raises(NotAStoreError, match="is a file"):
        create(tmp_path / "thesis.tex", tokens=TOKENS, **SHAPE)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 70000.0])
def test_values_that_cannot_be_held_stop_the_writer_with_layer_and_magnitude(tmp_path, bad):
    """NaN, infinity and float16 overflow leave an incomplete store, never a wrong one."""
    values = rows(64)
    values["resid_post", 1][11, 2] = bad
    message = r"layer 1 \(resid_post\), row 11: a value is not finite in float16; the largest .* 8"
    with (
        pytest.raises(ActivationError, match=message) as caught,
        create(tmp_path / "a", tokens=TOKENS, **SHAPE) as writer,
    ):
        writer.append(values)
    assert ("--encoding bfloat16" in str(caught.value)) == (not np.isnan(bad))
    with pytest.raises(IncompleteStoreError):
        open_store(tmp_path / "a")
    assert not list((tmp_path / "a").rglob("*.partial"))


def test_a_failing_producer_leaves_no_partial_files(tmp_path: Path):
    """An exception drops the unfinished shard and keeps the committed ones."""

    def produce() -> None:
        with create(tmp_path / "a", tokens=TOKENS, **SHAPE, shard_bytes=64) as writer:
            writer.append(rows(12))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce()
    assert resume(tmp_path / "a").pending() == list(range(1, 8))
    assert not list((tmp_path / "a").rglob("*.partial"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": np.arange(63)}, "whole sequences of context_length 8, got 63 tokens"),
        ({"tokens": np.zeros(0, int)}, "got 0 tokens"),
        ({"tokens": TOKENS.astype(float)}, "tokens must be integers"),
        ({"tokens": TOKENS - 1}, "tokens must fit uint32, got -1 to 62"),
        ({"documents": np.arange(3)}, r"documents must be integers of shape \(64,\)"),
        ({"token_flags": np.full(64, 8, np.uint8)}, r"token_flags may hold bits 0 to 2 .*, got 8"),
        ({"layers": (1, 0)}, r"layers must be ascending block indices from 0, got \[1, 0\]"),
        ({"sites": ("resid",)}, "sites must be different ones of resid_pre"),
        (
            {"encoding": "float8"},
            "encoding 'float8' is not one of float16, bfloat16, float32, int8",
        ),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_made(tmp_path, options, message):
    """One line each, and no directory left behind."""
    with pytest.raises(InputError, match=message):
        create(tmp_path / "a", **{"tokens": TOKENS, **SHAPE, **options})
    assert not (tmp_path / "a").exists()


def test_a_store_that_would_not_fit_is_refused_before_it_starts(tmp_path: Path):
    """The message has both numbers."""
    with pytest.raises(ResourceError, match=r"not enough disk .* needs \S+ TB, .* free"):
        create(
            tmp_path / "a",
            tokens=np.zeros(100_000, int),
            context_length=1,
            layers=range(50),
            d_model=100_000,
        )
    assert not (tmp_path / "a").exists()


def test_shapes_and_names_of_a_batch_are_checked(tmp_path: Path):
    """A batch has every (site, layer), each of the right width."""
    with create(tmp_path / "a", tokens=TOKENS, **SHAPE) as writer:
        with pytest.raises(ActivationError, match="expected activations of"):
            writer.append({("resid_post", 0): np.zeros((8, 4), np.float32)})
        with pytest.raises(
            ActivationError, match=r"layer 1 must have shape \(8, 4\), got \(8, 5\)"
        ):
            writer.append({**rows(8), ("resid_post", 1): np.zeros((8, 5), np.float32)})
        with pytest.raises(ActivationError, match="must be floats or float16, got int64"):
            writer.append({**rows(8), ("resid_post", 1): np.zeros((8, 4), np.int64)})


def moments_of(rows_of: dict[tuple[str, int], np.ndarray], groups: np.ndarray) -> GroupMoments:
    """Moments that a device would compute of float16 rows."""
    moments = Accumulator((0, 1), 4, SiteCodec("float16", 4))
    stored = [(rows_of["resid_post", layer].astype(np.float16),) for layer in (0, 1)]
    assert moments.add(groups, stored)
    arrays = {name: values.copy() for name, values in moments.tensors().items()}
    return GroupMoments.from_arrays((0, 1), 4, arrays)


def test_moments_may_be_given(tmp_path: Path):
    """The store is as if they had been computed here, whole and by its hashes."""
    generator = np.random.default_rng(0)
    batches = [
        {("resid_post", layer): generator.normal(size=(8, 4)).astype("f4") for layer in (0, 1)}
        for _ in range(8)
    ]
    with create(tmp_path / "here", tokens=TOKENS, **SHAPE, shard_bytes=200) as writer:
        for batch in batches:
            writer.append(batch)
    with create(tmp_path / "given", tokens=TOKENS, **SHAPE, shard_bytes=200) as writer:
        moments = GroupMoments((0, 1), 4)
        for number, batch in enumerate(batches):
            start = 8 * number
            # Some are summed here: the two are merged.
            if is_own := number % 3 != 1:
                moments.merge(moments_of(batch, writer.row_groups(start, start + 8)))
            writer.write(batch, moments_follow=is_own)
            if writer.position == writer.shard_range(start // writer.shard_rows).stop:
                writer.end_shard({"resid_post": moments})
                moments = GroupMoments((0, 1), 4)
    given, here = open_store(tmp_path / "given"), open_store(tmp_path / "here")
    assert given.store_id == here.store_id
    np.testing.assert_allclose(given.moments().m2, here.moments().m2, rtol=1e-6)
    assert verify(tmp_path / "given").problems == []


def test_a_shard_that_is_written_is_open_until_it_is_ended(tmp_path: Path):
    """Neither before its rows are there, nor by itself, nor with rows of the next."""
    writer = create(tmp_path / "a", tokens=TOKENS, **SHAPE, shard_bytes=200)
    assert writer.shard_rows == 24
    with pytest.raises(InputError, match="shard 0 is not full"):
        writer.end_shard()
    with pytest.raises(InputError, match="got 64 rows, but shard 0 ends after 24; write the rows"):
        writer.write(rows(64))
    for _ in range(3):
        with pytest.raises(InputError, match="shard 0 is not full"):
            writer.end_shard()
        writer.write(rows(8))
    assert 0 in writer.pending()
    with pytest.raises(InputError, match="got 8 rows, but shard 0 ends after 0"):
        writer.write(rows(8))
    writer.end_shard()
    assert writer.position == 24
    assert writer.pending() == [1, 2]


def test_given_moments_are_held_against_the_rows(tmp_path: Path):
    """Counts, sites and finiteness of moments are checked."""
    batch = rows(8)
    writer = create(tmp_path / "a", tokens=TOKENS, **SHAPE, shard_bytes=60)
    good = moments_of(batch, writer.row_groups(0, 8))
    writer.write(batch, moments_follow=True)
    with pytest.raises(InputError, match=r"moments of \['resid_post'\], got \['mlp_out'\]"):
        writer.end_shard({"mlp_out": good})
    with pytest.raises(InputError, match=r"moments of \['resid_post'\], got \[\]"):
        writer.end_shard()
    with pytest.raises(InputError, match="count 7 rows, but not those of shard 0, group by group"):
        writer.end_shard({"resid_post": moments_of(rows(7), writer.row_groups(0, 7))})
    good.mean_2LGD[1, 0, 3] = np.inf
    with pytest.raises(ActivationError, match="moments of shard 0 are not finite: they overflowed"):
        writer.end_shard({"resid_post": good})
    batch["resid_post", 1][5, 2] = np.nan
    writer.seek(0)
    writer.write(batch, moments_follow=True)
    with pytest.raises(ActivationError, match=r"layer 1 \(resid_post\), row 5: a value is not fin"):
        writer.end_shard({"resid_post": good})
    writer.seek(0)
    writer.write(rows(8))
    with pytest.raises(InputError, match=r"expected moments of \[\], got \['resid_post'\]"):
        writer.end_shard({"resid_post": good})


def test_a_ring_of_two_sets_of_buffers_is_enough(tmp_path: Path):
    """Rows of the call before last may be overwritten as soon as `append` returns."""
    shape = {"context_length": 64, "layers": (0,), "d_model": 512, "batch_sequences": 4}
    tokens = np.zeros(64 * 4 * 24, np.int64)
    ring = [np.empty((256, 512), np.float16) for _ in range(2)]
    with create(tmp_path / "a", tokens=tokens, **shape, shard_bytes=2**20) as writer:
        while writer.position is not None:
            buffer = ring[writer.position // 256 % 2]
            buffer[...] = writer.position // 256
            writer.append({("resid_post", 0): buffer})
    assert np.array_equal(
        open_store(tmp_path / "a").read("resid_post", 0)[:, 7], np.repeat(np.arange(24), 256)
    )
    assert verify(tmp_path / "a").problems == []


def test_one_set_of_buffers_is_enough_where_rows_are_waited_for(tmp_path: Path):
    """They are written when `drain` returns, and what was wrong with them has been raised."""
    shape = {"context_length": 64, "layers": (0,), "d_model": 512, "batch_sequences": 4}
    tokens = np.zeros(64 * 4 * 24, np.int64)
    buffer = np.empty((256, 512), np.float16)
    with create(tmp_path / "a", tokens=tokens, **shape, shard_bytes=2**20) as writer:
        while writer.position is not None:
            buffer[...] = writer.position // 256
            writer.append({("resid_post", 0): buffer})
            writer.drain()
    assert np.array_equal(
        open_store(tmp_path / "a").read("resid_post", 0)[:, 7], np.repeat(np.arange(24), 256)
    )
    assert verify(tmp_path / "a").problems == []
    with create(tmp_path / "b", tokens=tokens, **shape, shard_bytes=2**20) as writer:
        buffer[3] = np.inf
        writer.append({("resid_post", 0): buffer})
        with pytest.raises(ActivationError, match="row 3: a value is not finite"):
            writer.drain()
        buffer[3] = 0
        writer.seek(0)


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_threads_that_write_let_those_that_compute_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The priority is theirs alone: the thread that appends keeps its own."""
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found: set[int] = set()
    write = ShardFile.write

    def noted(file: ShardFile, values: np.ndarray) -> None:
        found.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        write(file, values)

    with create(tmp_path / "a", tokens=TOKENS, **SHAPE) as writer:
        monkeypatch.setattr(ShardFile, "write", noted)
        writer.append(rows(64))
    assert found == {max(before, NICENESS)}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_killed_setups_leave_nothing_behind(tmp_path: Path):
    """Temporary files of a dead process are removed wherever they lie; a living one's are not."""
    with create(tmp_path / "a", tokens=TOKENS, **SHAPE) as writer:
        writer.append(rows(64))
    (tmp_path / "a/complete.json").unlink()
    stale, alive = leave_partials(tmp_path / "a")
    resume(tmp_path / "a")
    assert [path for path in (*stale, alive) if path.exists()] == [alive]


def test_who_completes_a_store_takes_away_what_others_left_meanwhile(tmp_path: Path):
    """One of two writers is killed while the other is at work, which finishes alone."""
    with create(tmp_path / "a", tokens=TOKENS, **SHAPE) as writer:
        writer.append(rows(64))
        stale, alive = leave_partials(tmp_path / "a")
    assert [path for path in (*stale, alive) if path.exists()] == [alive]
    alive.unlink()
    assert verify(tmp_path / "a").problems == []


def leave_partials(path: Path) -> tuple[list[Path], Path]:
    """Temporary files of a process that is dead, and one of a living one."""
    folders = ("", "commits", "moments", "provenance", "activations/resid_post/1", "tokens")
    stale = []
    for folder in folders:
        partial, descriptor = open_partial(path / folder / "x")
        os.close(descriptor)
        stale.append(partial)
    alive, _ = open_partial(path / "x")
    return stale, alive
