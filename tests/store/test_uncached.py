"""Shards written past the page cache: equal bytes, and gone from there."""

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlsae.store import create, open_store
from mlsae.store.format.metadata import ArraySpec
from mlsae.store.tools.verify import verify
from mlsae.store.write.shardfile import ShardFile

ROWS = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float16)


@pytest.fixture
def memory_directory() -> Iterator[Path]:
    """On a file system that keeps its files in memory, and cannot drop them."""
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no /dev/shm, a file system in memory")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def write(path: Path, *, cached: bool, piece: int) -> str:
    spec = ArraySpec(
        name="activations",
        num_rows=len(ROWS),
        row_shape=(64,),
        dtype=ROWS.dtype,
        chunk_rows=1024,
        shard_rows=4096,
        dimensions=("row", "channel"),
    )
    file = ShardFile(path, spec, cached=cached)
    for start in range(0, len(ROWS), piece):
        file.write(ROWS[start : start + piece])
    digest = file.commit()
    assert file.num_bytes == path.stat().st_size
    return digest


def in_page_cache(path: Path) -> bool:
    """True if the first page of a file can be read without waiting for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return bool(os.preadv(descriptor, [bytearray(mmap.PAGESIZE)], 0, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("piece", [1, 333, 1024, 3000])
def test_a_shard_has_the_same_bytes(piece: int, tmp_path: Path) -> None:
    """However many rows come at a time."""
    kept = write(tmp_path / "kept", cached=True, piece=1000)
    assert write(tmp_path / "dropped", cached=False, piece=piece) == kept
    assert (tmp_path / "dropped").read_bytes() == (tmp_path / "kept").read_bytes()


def test_it_leaves_the_page_cache(tmp_path: Path) -> None:
    """Once it is on the disk; what is kept is still there."""
    probe = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        os.pwritev(probe, [b"x"], 0, 0x80)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        pytest.skip(f"{tmp_path}: this system has no writes that leave the page cache")
    finally:
        os.close(probe)
    write(tmp_path / "kept", cached=True, piece=1000)
    write(tmp_path / "dropped", cached=False, piece=1000)
    assert in_page_cache(tmp_path / "kept")
    assert not in_page_cache(tmp_path / "dropped")


def test_a_file_system_that_knows_no_such_writes_gets_usual_ones(memory_directory: Path) -> None:
    """A whole store, sound."""
    with create(
        memory_directory / "acts",
        tokens=np.arange(1500),
        context_length=10,
        layers=(0, 1),
        d_model=64,
        shard_bytes=50_000,
        cached=False,
    ) as writer:
        writer.append({("resid_post", 0): ROWS[:1500], ("resid_post", 1): ROWS[1500:]})
    store = open_store(memory_directory / "acts")
    assert np.array_equal(store.read("resid_post", 1), ROWS[1500:].astype(np.float32))
    assert verify(memory_directory / "acts").problems == []
