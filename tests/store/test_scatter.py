"""Many runs read by one call are the rows that reading gives, however they are read."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlsae.store import DamagedStoreError, Store, create, open_store
from mlsae.store.format.calibration import Calibrator
from mlsae.store.read import scatter as module
from mlsae.store.read.aio import MOST_READS, MOST_VECTORS, open_queue
from mlsae.store.read.scatter import Runs, ScatteredRows

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


def random_runs(generator: np.random.Generator, longest: int) -> tuple[Runs, int]:
    """Runs of any length up to the longest, some rows of them unwanted; and places for the rest."""
    count = 300 if longest < 1000 else 9
    num_rows = generator.integers(1, longest + 1, count)
    num_rows[:3] = 1, longest, longest
    start = generator.integers(0, NUM_ROWS - num_rows + 1)
    places = count * longest + 7
    place = generator.permutation(places)[: count * longest].reshape(count, longest)
    is_wanted = generator.random(place.shape) < 0.9
    place[~is_wanted | (np.arange(longest) >= num_rows[:, None])] = places
    return Runs(generator.integers(0, 2, count), start, num_rows, place), places


@pytest.mark.parametrize(
    ("encoding", "compression"),
    [("float16", "none"), ("int8", "none"), ("float32", "none"), ("int8", "zstd")],
)
@pytest.mark.parametrize("has_queue", [True, False])
@pytest.mark.parametrize("longest", [5, 120, 1500])
def test_each_row_is_at_its_place(
    encoding: str,
    compression: str,
    has_queue: bool,
    longest: int,
    make: Callable[..., Store],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs within chunks, over their borders and over shards', and nothing beside them."""
    if not has_queue:
        monkeypatch.setattr(module, "open_queue", lambda: None)
    store = make(encoding, compression)
    runs, places = random_runs(np.random.default_rng(longest), longest)
    assert longest < MOST_VECTORS or max(runs.num_rows) > MOST_VECTORS
    assert longest > 1000 or len(runs.start) > MOST_READS
    readers = [store.reader(*key) for key in KEYS]
    stored = [reader.read() for reader in readers]
    for fresh in (False, True):
        at = [open_store(store.place).reader(*key) for key in KEYS] if fresh else readers
        memory = ScatteredRows(at, places)
        expected = [rows.copy() for rows in memory.rows]
        for reader, start, num_rows, place in zip(*runs, strict=True):
            for values, rows in zip(expected, stored[reader], strict=True):
                values[place[:num_rows]] = rows[start : start + num_rows]
        memory.read(runs)
        for found, values in zip(memory.rows, expected, strict=True):
            assert np.array_equal(found[:-1].view(np.uint8), values[:-1].view(np.uint8))


def test_nothing_is_written_outside_the_memory(make: Callable[..., Store]) -> None:
    """Runs that do not fit are refused before the kernel hears of them."""
    memory = ScatteredRows([make().reader(*KEYS[0])], 10)

    def read(start: int, num_rows: int, place: list[int]) -> None:
        memory.read(Runs(*(np.array([value]) for value in (0, start, num_rows, place))))

    for place in ([0, 11], [-1, 0]):
        with pytest.raises(IndexError, match="do not fit into 11 places"):
            read(0, 1, place)
    for num_rows in (-1, 3):
        with pytest.raises(IndexError, match="more rows than the 2 places of each"):
            read(0, num_rows, [0, 1])
    for start, num_rows in [(-1, 1), (NUM_ROWS - 1, 2), (NUM_ROWS, 1)]:
        with pytest.raises(IndexError, match=f"not among the {NUM_ROWS} rows"):
            read(start, num_rows, [0, 1])
    assert not memory.rows[0].any()


def test_damage_is_found_as_in_reading(make: Callable[..., Store]) -> None:
    """A chunk that was never checked is; one whose file ended since is missed."""
    store = make()
    runs, places = random_runs(np.random.default_rng(0), 5)
    readers = [store.reader(*key) for key in KEYS]
    memory = ScatteredRows(readers, places)
    for reader in readers:
        reader.read()
    memory.read(runs)
    path = Path(store.place) / "activations/resid_post/3/c.1.0"
    data = bytearray(path.read_bytes())
    data[5000] ^= 4
    path.write_bytes(data)
    fresh = [open_store(store.place).reader(*key) for key in KEYS]
    with pytest.raises(DamagedStoreError, match=r"resid_post/3/c\.1\.0 .* checksum"):
        ScatteredRows(fresh, places).read(runs)
    os.truncate(path, 100)
    with pytest.raises(DamagedStoreError, match=r"resid_post/3/c\.1\.0 .* ends too early"):
        memory.read(runs)


def test_a_queue_says_what_each_read_gave(tmp_path: Path) -> None:
    """Bytes, fewer at a file's end; below 0 from a file that cannot be read on."""
    queue = open_queue()
    assert queue is not None
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    memory = np.zeros((2 * MOST_READS, 10), np.uint8)

    def read(files: list[int], offsets: list[int]) -> list[int]:
        first, num_rows = np.arange(len(files)), np.ones(len(files), np.int64)
        found = queue.read(np.array(files), np.array(offsets), memory, first, num_rows)
        return found.tolist()

    with path.open("rb") as file:
        number = file.fileno()
        assert read([number] * 3, [0, 95, 200]) == [10, 5, 0]
        assert memory[0].tolist() == list(range(10))
        assert memory[1].tolist() == [*range(95, 100), 0, 0, 0, 0, 0]
        assert read([number] * (MOST_READS + 5), [7] * (MOST_READS + 5)) == [10] * (MOST_READS + 5)
        found = read([number, 10**6, number], [0, 0, 0])
        assert found[0] == 10
        assert found[1] < 0
        assert (memory[3 : MOST_READS + 5] == memory[3]).all()
        # To places in turn, the last of them not filled.
        small = np.zeros((12, 3), np.uint8)
        places, first = np.array([5, 2, 9]), np.array([0, 1])
        got = queue.read(
            np.array([number] * 2), np.array([4, 95]), small, first, np.array([1, 2]), places
        )
        assert got.tolist() == [3, 5]
        assert small[5].tolist() == [4, 5, 6]
        assert small[[2, 9]].tolist() == [[95, 96, 97], [98, 99, 0]]


@pytest.mark.parametrize(
    ("first", "num_rows", "places"),
    [(-1, 1, None), (0, 5, None), (4, 1, None), (1, -1, None), (2, 2, [0, 1, 2]), (0, 1, [4])],
)
def test_the_kernel_is_not_asked_to_write_elsewhere(
    first: int, num_rows: int, places: list[int] | None, tmp_path: Path
) -> None:
    """Checked where addresses are made, whoever asks."""
    queue = open_queue()
    assert queue is not None
    (tmp_path / "file").write_bytes(bytes(100))
    memory = np.ones((4, 10), np.uint8)
    with (tmp_path / "file").open("rb") as file, pytest.raises(IndexError):
        queue.read(
            np.array([file.fileno()]),
            np.array([0]),
            memory,
            np.array([first]),
            np.array([num_rows]),
            None if places is None else np.array(places),
        )
    assert memory.all()
