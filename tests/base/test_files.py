"""Files are written whole or not at all, and sealed JSON shows every changed byte."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlsae.base.errors import ResourceError
from mlsae.base.files import DamagedFileError, canonical_json, read_sealed, seal, write_durably
from mlsae.base.machine.resources import available_memory, free_disk, require_disk, require_memory

CONTENT = {"b": [1, 2.5, None], "a": {"ü": True}, "c": "x"}


def test_canonical_json_is_one_form():
    """Sorted, compact, ASCII; NaN has no form."""
    assert canonical_json(CONTENT) == rb'{"a":{"\u00fc":true},"b":[1,2.5,null],"c":"x"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})


def test_a_sealed_file_is_read_back_and_every_changed_bit_is_seen(tmp_path: Path):
    """All bits of the file, one at a time, and a byte more or less."""
    path = tmp_path / "record.json"
    data = seal(CONTENT)
    path.write_bytes(data)
    assert read_sealed(path) == CONTENT
    changed = [data[:-1], data + b"\n", b"", b"[]", b"{}"]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        changed.append(bytes(flipped))
    for wrong in changed:
        path.write_bytes(wrong)
        with pytest.raises(DamagedFileError, match=r"record\.json is damaged"):
            read_sealed(path)


def test_content_cannot_bring_its_own_seal():
    """The key of the seal is reserved."""
    with pytest.raises(ValueError, match="has a key 'sha256' already"):
        seal({"sha256": "0"})


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path):
    """A real file-size limit of the process stops the write half-way."""
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from mlsae.base.files import write_durably\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_durably(Path(sys.argv[1]), b'new' * 1000)\n"
    )
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    assert "File too large" in done.stderr
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"


def test_too_little_memory_or_disk_is_said_with_both_numbers(tmp_path: Path):
    """Absent directories are measured by the parent that exists."""
    assert 0 < available_memory() < 10**15
    assert free_disk(tmp_path / "a" / "b") > 0
    require_memory(1, "x", "y")
    require_disk(tmp_path, 1, "x", "y")
    with pytest.raises(
        ResourceError, match=r"^not enough memory for it: needs 1e\+03 TB, .* available; try less$"
    ):
        require_memory(10**15, "it", "try less")
    with pytest.raises(
        ResourceError, match=r"^not enough disk for it at .*: needs 1e\+03 TB, .* free"
    ):
        require_disk(tmp_path, 10**15, "it", "try less")
