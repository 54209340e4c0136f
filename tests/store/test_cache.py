"""Parts read from a remote store are kept: asked for once, within bounds, never trusted blindly."""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from mlsae.store import DamagedStoreError, open_store
from mlsae.store.places.cache import CachedObjects, ChunkCache, default_cache_dir
from mlsae.store.places.remote import open_objects

LARGE = "activations/resid_post/0/c.0.0"


def entries(directory: Path) -> list[Path]:
    """The files that hold what was kept."""
    return sorted(path for path in directory.glob("chunks/*/*/*") if path.is_file())


def held(directory: Path) -> int:
    """Bytes of all files of a cache, but for the lock's digits."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "lock"]
    return sum(path.stat().st_size for path in files)


def part(content: dict[str, bytes], offset: int, num_bytes: int = 1000) -> bytes:
    return content[LARGE][offset : offset + num_bytes]


@pytest.fixture
def content(content: dict[str, bytes]) -> dict[str, bytes]:
    """With what makes a store complete: nothing is kept of one that is not."""
    return {**content, "complete.json": b'{"store_id": "one"}\n'}


@pytest.fixture
def objects(web: Any, tmp_path: Path, open_quickly: Any) -> Any:
    """Objects on a web server, with a cache of 100 kB, their `complete.json` read."""
    objects = open_quickly(f"{web.url}/store", cache_dir=tmp_path / "cache", cache_bytes=100_000)
    objects.read("complete.json", 100)
    web.faults.requests.clear()
    return objects


def read(objects: Any, offset: int, num_bytes: int = 1000) -> bytes:
    out = np.empty(num_bytes, np.uint8)
    count: int = objects.read_into(LARGE, offset, out)
    return out.tobytes()[:count]


def test_what_was_read_is_not_asked_for_again(objects, web, content, tmp_path):
    """By this process, nor by another; other parts are."""
    for _ in range(3):
        assert read(objects, 0) == part(content, 0)
    assert len(web.faults.requests) == 1
    assert read(objects, 0, 999) == part(content, 0, 999)
    assert read(objects, 1) == part(content, 1)
    assert len(web.faults.requests) == 3
    script = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from mlsae.store.places.remote import open_objects\n"
        "objects = open_objects(sys.argv[1], cache_dir=Path(sys.argv[2]))\n"
        "out = np.empty(1000, np.uint8)\n"
        "objects.read('complete.json', 100)\n"
        f"assert objects.read_into('{LARGE}', 0, out) == 1000\n"
        "sys.stdout.buffer.write(out.tobytes())"
    )
    command = [sys.executable, "-c", script, f"{web.url}/store", str(tmp_path / "cache")]
    assert subprocess.run(command, capture_output=True, check=True).stdout == part(content, 0)
    assert [name for _, name, _ in web.faults.requests[3:]] == ["store/complete.json"]


def test_a_part_past_the_end_is_not_kept(objects, web, content):
    for _ in range(2):
        assert read(objects, 299_500) == part(content, 299_500, 500)
    assert len(web.faults.requests) == 2


def test_a_cache_of_no_bytes_keeps_none_and_uses_none(objects, web, tmp_path, open_quickly):
    """Whoever checks a store wants its bytes, not copies of them."""
    read(objects, 0)
    kept = entries(tmp_path / "cache")
    uncached = open_quickly(f"{web.url}/store", cache_dir=tmp_path / "cache", cache_bytes=0)
    uncached.read("complete.json", 100)
    web.faults.requests.clear()
    for offset in (0, 0, 1000):
        read(uncached, offset)
    assert len(web.faults.requests) == 3
    assert entries(tmp_path / "cache") == kept


def test_no_more_is_held_than_may_be_and_what_was_used_last_stays(objects, web, tmp_path):
    """Ten times as much goes through it; one part is used again and again."""
    generator = random.Random(0)
    most = 0
    for step in range(1000):
        read(objects, 0)
        read(objects, 1000 + 1000 * generator.randrange(290))
        if step % 10 == 0:
            most = max(most, held(tmp_path / "cache"))
    assert 80_000 < most <= 100_000
    assert len([1 for _, _, asked in web.faults.requests if asked == "bytes=0-999"]) == 1
    assert len(web.faults.requests) < 900


def test_a_part_larger_than_the_cache_passes_by(objects, tmp_path, content):
    assert read(objects, 0, 95_000) == part(content, 0, 95_000)
    assert entries(tmp_path / "cache") == []


def test_nothing_else_in_the_directory_is_touched(objects, tmp_path):
    """The cache's directory may hold other things."""
    mine = [tmp_path / "cache" / name for name in ("notes", "chunks/notes", "chunks/x/y/z")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10))
        os.utime(path, (1, 1))
    for offset in range(0, 200_000, 1000):
        read(objects, offset)
    assert all(path.exists() for path in mine)


def test_damage_in_the_cache_is_noticed_and_mended(objects, web, content, tmp_path):
    """A flipped bit anywhere, a missing or additional end, nothing, another part's file."""
    read(objects, 5000)
    (other,) = entries(tmp_path / "cache")
    foreign = other.read_bytes()
    read(objects, 0)
    (file,) = set(entries(tmp_path / "cache")) - {other}
    sound = file.read_bytes()
    generator = random.Random(0)
    flipped = []
    for _ in range(40):
        data = bytearray(sound)
        bit = generator.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(data))
    for bad in [*flipped, sound[:-1], sound[:-4], sound + b"\0", b"", foreign]:
        file.write_bytes(bad)
        web.faults.requests.clear()
        for _ in range(2):
            assert read(objects, 0) == part(content, 0)
        assert len(web.faults.requests) == 1
        assert file.read_bytes() == sound


def test_a_part_that_is_forgotten_is_asked_for_again(objects, web, content):
    assert not objects.forget(LARGE, 0, 1000)
    read(objects, 0)
    assert objects.forget(LARGE, 0, 1000)
    assert not objects.forget(LARGE, 0, 1000)
    assert read(objects, 0) == part(content, 0)
    assert len(web.faults.requests) == 2


def test_another_store_at_the_same_address_has_its_own_parts(web, tmp_path, open_quickly):
    """The one was kept; then the other was put in its place."""
    options = {"cache_dir": tmp_path / "cache", "cache_bytes": 10**6}
    objects = open_quickly(f"{web.url}/store", **options)
    assert isinstance(objects, CachedObjects)
    read(objects, 0)
    assert entries(tmp_path / "cache") == []
    objects.read("complete.json", 100)
    read(objects, 0)
    assert len(entries(tmp_path / "cache")) == 1
    (web.root / "store/complete.json").write_bytes(b'{"store_id": "two"}\n')
    (web.root / "store" / LARGE).write_bytes(bytes(300_000))
    again = open_quickly(f"{web.url}/store", **options)
    again.read("complete.json", 100)
    assert read(again, 0) == bytes(1000)
    assert len(entries(tmp_path / "cache")) == 2


def test_a_store_read_through_a_bad_cache_is_read_right(sample_maker, servers, tmp_path):
    """Chunks that went bad on their way are not kept; a store that is bad itself is refused."""
    made = sample_maker("served/acts")
    local = open_store(made.path)
    name = "acts/activations/resid_post/0/c.0.0"
    with servers.serving_files(tmp_path / "served") as web:
        options = {"cache_dir": tmp_path / "cache", "cache_bytes": 10**6}

        def flip_once(handler: Any) -> None:
            data = bytearray((tmp_path / "served" / name).read_bytes())
            first, last = handler.headers["Range"].removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1, len(data))
            if start == 0 and stop > 1:
                del web.replies[name]
                data[7] ^= 1
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            handler.answer(206, bytes(data[start:stop]), headers)

        web.replies[name] = flip_once
        store = open_store(f"{web.url}/acts", **options)
        for ours, theirs in zip(
            store.read("resid_post", 0), local.read("resid_post", 0), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        assert name not in web.replies
        web.faults.requests.clear()
        open_store(f"{web.url}/acts", **options).read("resid_post", 0)
        asked = [of for _, of, part in web.faults.requests if of == name and part != "bytes=0-0"]
        assert asked == []

        data = bytearray((tmp_path / "served" / name).read_bytes())
        data[7] ^= 1
        (tmp_path / "served" / name).write_bytes(data)
        shutil.rmtree(tmp_path / "cache")
        for _ in range(2):
            with pytest.raises(DamagedStoreError, match=r"shard 0 of activations/resid_post/0"):
                open_store(f"{web.url}/acts", **options).read("resid_post", 0)


WORK = """
import sys, random, numpy as np
from pathlib import Path
from mlsae.store.places.cache import ChunkCache
cache, generator = ChunkCache(Path(sys.argv[1]), 100_000), random.Random(int(sys.argv[2]))
out, bad = np.empty(1000, np.uint8), 0
print("ready", flush=True)
for step in range(int(sys.argv[3])):
    number = generator.randrange(300)
    data = np.full(1000, number % 251, np.uint8)
    if cache.get("store", str(number), out):
        bad += not np.array_equal(out, data)
    else:
        cache.put("store", str(number), data)
print(bad, flush=True)
"""


def start(directory: Path, seed: int, steps: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WORK, str(directory), str(seed), str(steps)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_share_a_cache_and_its_bound(tmp_path):
    """Three at once; whenever none of them is adding, no more is held than may be."""
    ChunkCache(tmp_path, 100_000).put("store", "first", np.zeros(1000, np.uint8))
    processes = [start(tmp_path, seed, 400) for seed in range(3)]
    most = 0
    while any(process.poll() is None for process in processes):
        with (tmp_path / "chunks/lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            most = max(most, held(tmp_path))
    assert [process.communicate()[0] for process in processes] == ["0\n"] * 3
    assert 80_000 < most <= 100_000


def test_a_process_that_is_killed_leaves_nothing_that_counts_for_ever(tmp_path):
    """Killed at five random instants; the next ones find the lock free and the bound kept."""
    generator = random.Random(0)
    for seed in range(5):
        process = start(tmp_path, seed, 10**9)
        seen = generator.randrange(2000)
        while len(entries(tmp_path)) < 50 and seen:
            seen -= 1
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    last = start(tmp_path, 99, 600)
    assert last.communicate()[0] == "0\n"
    assert 60_000 < held(tmp_path) <= 100_000
    assert not (tmp_path / "chunks/partial").exists()
    counted = int((tmp_path / "chunks/lock").read_text())
    assert held(tmp_path) <= counted <= held(tmp_path) + 1004


@pytest.mark.parametrize("digits", [b"", b"99999999999", b"-5", b"\xff\xff", b"0" * 40])
def test_a_count_that_is_wrong_is_made_right(tmp_path, digits):
    cache = ChunkCache(tmp_path, 10_000)
    data = np.zeros(1000, np.uint8)
    for number in range(5):
        cache.put("store", str(number), data)
    (tmp_path / "chunks/lock").write_bytes(digits)
    for number in range(5, 30):
        cache.put("store", str(number), data)
    assert held(tmp_path) <= 10_000
    assert int((tmp_path / "chunks/lock").read_text()) == held(tmp_path)
    assert cache.get("store", "29", data)


def test_a_directory_that_cannot_be_written_stops_no_work(
    web, content, tmp_path, open_quickly, caplog
):
    """One warning, and everything is read from its source."""
    (tmp_path / "file").write_text("in the way")
    objects = open_quickly(f"{web.url}/store", cache_dir=tmp_path / "file", cache_bytes=10**6)
    objects.read("complete.json", 100)
    together = Barrier(8)

    def read_together(number: int) -> bytes:
        together.wait()
        return read(objects, 1000 * number)

    with ThreadPoolExecutor(8) as pool:
        expected = [part(content, 1000 * number) for number in range(8)]
        assert list(pool.map(read_together, range(8))) == expected
    assert read(objects, 0) == part(content, 0)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/file cannot be written (Not a directory): what is read of remote stores is "
        f"not kept from here on; free some space, or name another directory with --cache-dir"
    ]


FULL = """
import sys
from pathlib import Path
import numpy as np
from mlsae.store.places.cache import ChunkCache
cache, out = ChunkCache(Path(sys.argv[1]), 2**30), np.empty(2**20, np.uint8)
for number in range(8):
    cache.put("store", str(number), np.full(2**20, number, np.uint8))
files = [path for path in (Path(sys.argv[1]) / "chunks").rglob("*") if path.is_file()]
print(sorted(path.stat().st_size for path in files))
print([cache.get("store", str(number), out) and int(out[0]) == number for number in range(8)])
"""


def test_a_full_disk_stops_no_work(tmp_path):
    """A real file system of four megabytes: what fitted is kept, one line says that no more is."""
    if shutil.which("unshare") is None:
        pytest.skip("needs the unshare command to mount a small file system")
    mount = f"mount -t tmpfs -o size=4m tmpfs '{tmp_path}' && exec \"$@\""
    command = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    command += [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"{[7] + [2**20 + 4] * 3}\n{[True] * 3 + [False] * 5}\n"
    assert done.stderr == (
        f"{tmp_path} cannot be written (No space left on device): what is read of remote stores "
        f"is not kept from here on; free some space, or name another directory with --cache-dir\n"
    )


def test_the_cache_is_where_caches_of_the_user_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "mlsae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache/mlsae"
    objects = open_objects("https://host/store")
    assert isinstance(objects, CachedObjects)
    assert objects.cache.directory == tmp_path / ".cache/mlsae"
    assert objects.cache.max_bytes == 10 * 2**30
