"""A part of the table `events`: sorted by latent, whole or absent, equal to what came in."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlsae.analyze.events import part as event_part
from mlsae.analyze.events.part import PartWriter
from mlsae.analyze.results.tables import schema
from mlsae.base.files import sha256_file

SCHEMA = schema("events", {"store_id": "ab"})
PATH = "layer-7/part-000000000000.parquet"


def part_writer(directory: Path, part_events: int = 10**6, num_latents: int = 50) -> PartWriter:
    (directory / "layer-7").mkdir(parents=True, exist_ok=True)
    return PartWriter(
        directory,
        PATH,
        scratch=directory,
        schema=SCHEMA,
        layer=7,
        num_latents=num_latents,
        part_events=part_events,
    )


def _batch(num_rows: int, first: int, seed: int, num_latents: int = 50) -> tuple[Any, ...]:
    generator = np.random.default_rng(seed)
    values = np.maximum(generator.normal(size=(num_rows, 3)), 0).astype(np.float32)
    indices = np.stack([generator.permutation(num_latents)[:3] for _ in range(num_rows)])
    rows = np.arange(first, first + num_rows)
    return rows, 3 * rows, values, indices


@pytest.mark.parametrize("num_latents", [50, 70_000], ids=["16 bits", "32 bits"])
@pytest.mark.parametrize("group", [1, 13, 10**6])
def test_events_are_the_active_latents_by_latent_then_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, num_latents: int
) -> None:
    monkeypatch.setattr(event_part, "GROUP_EVENTS", group)
    expected = []
    with part_writer(tmp_path, num_latents=num_latents) as writer:
        for number in range(4):
            batch = _batch(9, 20 * number, number, num_latents)
            writer.append(*batch)
            for row, token, values, indices in zip(*batch, strict=True):
                for value, latent in zip(values, indices, strict=True):
                    if value > 0:
                        expected.append((row, token, 7, latent, value))
    expected.sort(key=lambda event: (event[3], event[0]))
    found = pq.ParquetFile(tmp_path / PATH).read()
    assert list(zip(*(found[name].to_pylist() for name in found.column_names), strict=True)) == (
        expected
    )
    assert found.schema.equals(SCHEMA, check_metadata=True)
    record = writer.record
    assert record is not None
    assert (record.path, record.num_events) == (PATH, len(expected))
    assert record.num_bytes == (tmp_path / PATH).stat().st_size
    assert record.sha256 == sha256_file(tmp_path / PATH)
    metadata = pq.ParquetFile(tmp_path / PATH).metadata
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    assert [of.num_rows for of in groups[:-1]] == [group] * (len(groups) - 1)
    at = SCHEMA.get_field_index("latent")
    bounds = [(of.column(at).statistics.min, of.column(at).statistics.max) for of in groups]
    in_order = [bound for pair in bounds for bound in pair]
    assert in_order == sorted(in_order)


def test_more_events_than_are_held_make_several_sorted_stretches(tmp_path: Path) -> None:
    with part_writer(tmp_path, part_events=10) as writer:
        for number in range(4):
            writer.append(*_batch(9, 20 * number, number))
    file = pq.ParquetFile(tmp_path / PATH)
    stretches = [file.read_row_group(n) for n in range(file.num_row_groups)]
    assert len(stretches) == 4
    for number, stretch in enumerate(stretches):
        assert set(stretch["row"].to_pylist()) <= set(range(20 * number, 20 * number + 9))
        keys = list(zip(stretch["latent"].to_pylist(), stretch["row"].to_pylist(), strict=True))
        assert keys == sorted(keys)
        _, _, values, _ = _batch(9, 20 * number, number)
        assert len(keys) == (values > 0).sum()


def test_a_part_without_an_event_is_an_empty_table_of_the_same_schema(tmp_path: Path) -> None:
    with part_writer(tmp_path) as writer:
        rows, tokens, values, indices = _batch(5, 0, seed=0)
        writer.append(rows, tokens, np.zeros_like(values), indices)
        writer.append(rows[:0], tokens[:0], values[:0], indices[:0])
    found = pq.ParquetFile(tmp_path / PATH).read()
    assert writer.record is not None
    assert len(found) == writer.record.num_events == 0
    assert found.schema.equals(SCHEMA, check_metadata=True)


def write_and_fail(directory: Path) -> None:
    with part_writer(directory, part_events=1) as writer:
        rows, tokens, values, indices = _batch(9, 0, seed=0)
        writer.append(rows, tokens, values, indices)
        writer.append(rows, tokens, values, indices[:1])


def test_what_fails_on_the_way_leaves_the_part_as_it_was(tmp_path: Path) -> None:
    """No file where there was none, and the old one where there was."""
    for before in ([], [PATH]):
        with pytest.raises(IndexError):
            write_and_fail(tmp_path)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [str(path.relative_to(tmp_path)) for path in files] == before
        (tmp_path / PATH).write_bytes(b"old")
    assert (tmp_path / PATH).read_bytes() == b"old"


FULL_DISK = """
import shutil, sys
from pathlib import Path
import numpy as np
from mlsae.analyze.results.tables import schema
from mlsae.analyze.events.part import PartWriter
from mlsae.base.errors import ResourceError

disk = Path(sys.argv[1])
(disk / "layer-0").mkdir()
def write(num_rows):
    generator = np.random.default_rng(0)
    rows = np.arange(num_rows)
    with PartWriter(disk, "layer-0/part-0.parquet", scratch=disk,
                    schema=schema("events", {}), layer=0, num_latents=1000,
                    part_events=10_000) as writer:
        values = generator.uniform(1, 2, size=(num_rows, 4)).astype(np.float32)
        writer.append(rows, rows, values, generator.integers(0, 1000, size=(num_rows, 4)))
    return writer.record
for num_rows in (2_000, 60_000):
    try:
        print(write(num_rows).num_events)
    except ResourceError as error:
        print(error)
print([path.name for path in disk.rglob("*") if path.is_file()])
"""


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    """A real file system of a quarter of a megabyte."""
    if shutil.which("unshare") is None:
        pytest.skip("needs the unshare command to mount a small file system")
    mount = f"mount -t tmpfs -o size=256k tmpfs '{tmp_path}' && exec \"$@\""
    command = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    done = subprocess.run(
        [*command, sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, second, files = done.stdout.splitlines()
    assert first == "8000"
    assert re.fullmatch(r"the disk is full: .*/part-0\.parquet could not be written; .*", second)
    assert files == "['part-0.parquet']"
