"""Rows read straight to their places are the rows that reading gives, however they are read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsae.store import DamagedStoreError, Store, create, open_store
from mlsae.store.aio import MOST_READS, Queue, open_queue
from mlsae.store.calibration import Calibrator
from mlsae.store.scatter import Places, Runs

KEYS = [("resid_post", 0), ("resid_post", 3)]
NUM_ROWS = 2000


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Store]:
    """Make a store of two layers: `make(encoding="int8", compression="zstd")`."""

    def make(encoding: str = "float16", compression: str = "none") -> Store:
        generator = np.random.default_rng(0)
        rows = {key: generator.normal(size=(NUM_ROWS, 70)).astype(np.float32) for key in KEYS}
        calibrator = Calibrator(KEYS, 70)
        calibrator.add(rows)
        with create(
            tmp_path / "acts",
            tokens=np.arange(NUM_ROWS),
            context_length=10,
            layers=(0, 3),
            d_model=70,
            encoding=encoding,
            compression=compression,
            calibration=calibrator.result() if encoding == "int8" else None,
            shard_bytes=100_000,
        ) as writer:
            writer.append(rows)
        return open_store(tmp_path / "acts")

    return make


def random_runs(generator: np.random.Generator, longest: int) -> tuple[Runs, np.ndarray]:
    """Runs of any length, two on every other line, and a table of distinct places."""
    count = 150 if longest < 1000 else 9
    num_rows = generator.integers(1, longest + 1, count)
    num_rows[:3] = 1, longest, longest
    start = generator.integers(0, NUM_ROWS - num_rows + 1)
    line = np.arange(count) * 2 // 3
    column = np.where(np.arange(count) % 3 == 1, longest + 2, 1)
    to = generator.permutation(count * (2 * longest + 2)).reshape(count, -1)
    return Runs(generator.integers(0, 2, count), start, num_rows, line, column), to


def check(store: Store, runs: Runs, to: np.ndarray, queue: Queue | None) -> None:
    """Every place has its row, and every other place is as it was."""
    readers = [store.reader(*key) for key in KEYS]
    stored = [reader.read() for reader in readers]
    out = [np.full((to.size, part.width), 77).astype(part.dtype) for part in store.parts]
    expected = [values.copy() for values in out]
    for reader, start, num_rows, line, column in zip(*(c.tolist() for c in runs), strict=True):
        places = to[line, column : column + num_rows]
        for values, rows in zip(expected, stored[reader], strict=True):
            values[places] = rows[start : start + num_rows]
    for fresh in (False, True):
        at = [open_store(store.place).reader(*key) for key in KEYS] if fresh else readers
        for values in out:
            values[:] = np.array(77).astype(values.dtype)
        Places(out, to).fill(at, runs, queue)
        for found, values in zip(out, expected, strict=True):
            assert np.array_equal(found.view(np.uint8), values.view(np.uint8))


@pytest.mark.parametrize(
    ("encoding", "compression"),
    [("float16", "none"), ("int8", "none"), ("float32", "none"), ("int8", "zstd")],
)
@pytest.mark.parametrize("has_queue", [True, False])
@pytest.mark.parametrize("longest", [5, 120, 1500])
def test_rows_lie_where_the_table_says(
    encoding: str, compression: str, has_queue: bool, longest: int, make: Callable[..., Store]
) -> None:
    """Runs within chunks, over their borders and over shards', longer than one call reads."""
    runs, to = random_runs(np.random.default_rng(longest), longest)
    check(make(encoding, compression), runs, to, open_queue() if has_queue else None)


def test_nothing_is_written_outside_the_memory_given(make: Callable[..., Store]) -> None:
    """Places and runs that are not there are refused before the kernel hears of them."""
    store, out = make(), [np.zeros((10, 70), np.float16)]
    for place in (-1, 10):
        with pytest.raises(IndexError, match=f"{place} to .*not in 0 to 9|0 to {place} are not"):
            Places(out, np.array([[0, place]]))
    places = Places(out, np.zeros((2, 5), np.int64))
    for num_rows, line, column in [(1, 2, 0), (6, 0, 0), (1, 0, 5), (2, 1, 4), (1, 0, -1)]:
        runs = Runs(*(np.array([value]) for value in (0, 0, num_rows, line, column)))
        with pytest.raises(IndexError, match="not within a line of a table of 2 × 5"):
            places.fill([store.reader(*KEYS[0])], runs, open_queue())


def test_damage_is_found_as_in_reading(make: Callable[..., Store]) -> None:
    """A chunk that was never checked is; one whose file ended since is missed."""
    store = make()
    readers = [store.reader(*key) for key in KEYS]
    runs, to = random_runs(np.random.default_rng(0), 5)
    places = Places([np.empty((to.size, 70), np.float16)], to)
    queue = open_queue()
    for reader in readers:
        reader.read()
    places.fill(readers, runs, queue)
    path = Path(store.place) / "activations/resid_post/3/c.1.0"
    data = bytearray(path.read_bytes())
    data[5000] ^= 4
    path.write_bytes(data)
    fresh = [open_store(store.place).reader(*key) for key in KEYS]
    with pytest.raises(DamagedStoreError, match=r"resid_post/3/c\.1\.0 .* checksum"):
        places.fill(fresh, runs, queue)
    os.truncate(path, 100)
    with pytest.raises(DamagedStoreError, match=r"resid_post/3/c\.1\.0 .* ends too early"):
        places.fill(readers, runs, queue)


def test_a_queue_says_what_each_read_gave(tmp_path: Path) -> None:
    """Bytes, fewer at a file's end; below 0 from a file that cannot be read on."""
    queue = open_queue()
    assert queue is not None
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    memory = np.zeros((MOST_READS, 10), np.uint8)
    pieces = np.empty((MOST_READS, 2), np.uint64)
    pieces[:, 0], pieces[:, 1] = memory.ctypes.data + 10 * np.arange(MOST_READS), 10
    addresses, ones = pieces.ctypes.data + 16 * np.arange(MOST_READS), np.ones(MOST_READS, int)

    def read(files: list[int], offsets: list[int]) -> list[int]:
        count = len(files)
        found: Any = queue.read(files, offsets, addresses[:count], ones[:count])
        return found.tolist()

    with path.open("rb") as file:
        number = file.fileno()
        assert read([number] * 3, [0, 95, 200]) == [10, 5, 0]
        assert memory[0].tolist() == list(range(10))
        assert memory[1].tolist() == [*range(95, 100), 0, 0, 0, 0, 0]
        assert read([number] * MOST_READS, [7] * MOST_READS) == [10] * MOST_READS
        found = read([number, 10**6, number], [0, 0, 0])
        assert found[0] == 10
        assert found[1] < 0
        assert (memory[3:] == memory[3]).all()
