"""Text comes from files and hub data sets alike, and what is no text is refused in one line."""

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlsae.base.errors import MlsaeError
from mlsae.harvest.text.sources import TextSettings, open_sources

TEXTS = ["one", "", "two\nlines", "três"]


def read(dataset: Path | str, **settings: Any) -> list[Any]:
    (source,) = open_sources(TextSettings(dataset=str(dataset), **settings))
    return list(source.documents)


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(dataset: Path | str, **settings: Any) -> str:
    with pytest.raises(MlsaeError) as info:
        read(dataset, **settings)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_text_file_is_one_document_whatever_the_column(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("two\n\nparagraphs: três", encoding="utf-8")
    assert read(path) == read(path, text_column="x") == ["two\n\nparagraphs: três"]


def test_json_lines_are_documents_and_a_missing_text_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [*(json.dumps({"body": text, "n": 1}) for text in TEXTS), "", '{"body": null}']
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read(path, text_column="body") == [*TEXTS, ""]


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": TEXTS, "n": [1, 2, 3, 4]}), path)
    assert read(path, text_column="body") == TEXTS


@pytest.fixture
def hub_directory(tmp_path: Path) -> Path:
    """A data set as the hub lays it out: splits as Parquet shards in data/."""
    data = tmp_path / "dataset" / "data"
    data.mkdir(parents=True)
    for split, shards in {"train": [TEXTS[:2], TEXTS[2:]], "test": [["held out"]]}.items():
        for index, texts in enumerate(shards):
            name = f"{split}-{index:05d}-of-{len(shards):05d}.parquet"
            pq.write_table(pa.table({"text": texts}), data / name)
    return data.parent


def test_directory_in_hub_layout_is_streamed_split_by_split(hub_directory: Path) -> None:
    assert read(hub_directory) == TEXTS
    assert read(hub_directory, split="test") == ["held out"]


def test_streaming_reads_no_further_than_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nbroken')
    (source,) = open_sources(TextSettings(dataset=str(path)))
    assert next(source.documents) == "good"


def test_unknown_split_is_refused(hub_directory: Path) -> None:
    assert refused(hub_directory, split="validation") == (
        f"{hub_directory} has no split 'validation': its files are named test and train, such as "
        "data/test-00000-of-00001.parquet; choose one with --split, or rename the files"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "dataset"])
def test_absent_column_is_refused_naming_those_there(
    name: str, hub_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": 1}')
    pq.write_table(pa.table({"text": ["x"], "id": [1]}), tmp_path / "a.parquet")
    text = refused(tmp_path / name, text_column="content")
    columns = "text" if name == hub_directory.name else "id, text"
    assert f"has no column 'content': row 0 has {columns}; name the one" in text
    assert "--text-column" in text


def test_compressed_files_hold_the_same_documents(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    for data, kind, expected in ((lines, "jsonl", TEXTS), (b"a\nb", "txt", ["a\nb"])):
        gz, zst = tmp_path / f"a.{kind}.gz", tmp_path / f"a.{kind}.zst"
        gz.write_bytes(gzip.compress(data[:3]) + gzip.compress(data[3:]))
        zst.write_bytes(pa.compress(data, codec="zstd", asbytes=True))
        assert read(gz) == read(zst) == expected
        assert read(gz.rename(tmp_path / gz.name.upper())) == expected


@pytest.mark.parametrize("kind", ["txt.gz", "txt.zst", "jsonl.gz", "jsonl.zst"])
def test_damaged_compressed_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    lines = "".join(f'{{"text": "{i * i}"}}\n' for i in range(1000)).encode()
    codec = "gzip" if kind.endswith("gz") else "zstd"
    whole = pa.compress(lines, codec=codec, asbytes=True)
    for data, reason in (
        (whole[:-9], "Truncated compressed stream"),
        (lines, "decompress|inflate"),
    ):
        path.write_bytes(data)
        text = refused(path)
        assert text.startswith(f"{path} cannot be decompressed: ")
        assert re.search(reason, text)
        assert text.endswith("the file is damaged or was not copied whole")


def test_directory_of_files_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "c.txt.gz", ".hidden.csv", ".git/x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(name.encode()) if name.endswith("gz") else name.encode())
    assert read(tmp_path) == ["a/b/c.txt", "a/z.txt", "b.txt", "c.txt.gz"]


def test_directory_that_cannot_be_read_whole_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    assert "holds files of several kinds, such as a.txt and b.jsonl.gz; give" in refused(tmp_path)
    (tmp_path / "notes.csv").write_text("x")
    assert f"{tmp_path} holds notes.csv, which is not one of .txt, .jsonl" in refused(tmp_path)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [({"split": "test"}, "--split test"), ({"subset": "en"}, "--subset en")],
)
def test_plain_files_have_no_splits(settings: dict[str, str], flag: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt")
    for name in (path, tmp_path):
        assert refused(name, **settings) == (
            f"{flag} is for hub data sets and directories in hub layout; {name} is plain files, so "
            "leave it out"
        )


def test_subsets_of_a_data_set(hub_directory: Path) -> None:
    (hub_directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  data_files: data/train-*\n"
        "- config_name: held\n  data_files: data/test-*\n---\n"
    )
    assert read(hub_directory, subset="all") == TEXTS
    assert read(hub_directory, subset="held") == ["held out"]
    text = refused(hub_directory, subset="other")
    assert f"data set {hub_directory}, subset 'other', split 'train', cannot be read" in text


def test_other_columns_of_a_data_set_are_not_read(tmp_path: Path) -> None:
    """Such as a date that Python does not have."""
    write(
        tmp_path / "README.md", "---\nconfigs:\n- config_name: a\n  data_files: '*.parquet'\n---\n"
    )
    until = pa.array([2_932_897] * 4, pa.date32())
    pq.write_table(pa.table({"text": TEXTS, "until": until}), tmp_path / "a.parquet")
    assert read(tmp_path) == TEXTS


def test_shuffling_is_seeded_and_loses_nothing(tmp_path: Path) -> None:
    """A card and plain files alike; the buffer of 10,000 is filled and drawn from."""
    files, hub = tmp_path / "files", tmp_path / "hub"
    write(hub / "README.md", "---\nconfigs:\n- config_name: a\n  data_files: train.jsonl\n---\n")
    texts = [[f"{part}-{i}" for i in range(5000)] for part in range(3)]
    for part in range(3):
        pq.write_table(pa.table({"text": texts[part]}), write(files / f"{part}.parquet"))
    write(
        hub / "train.jsonl", "".join(f'{{"text": "{text}"}}\n' for part in texts for text in part)
    )
    for directory in (files, hub):
        in_order = read(directory)
        first, again, other = (read(directory, shuffle_seed=seed) for seed in (1, 1, 2))
        assert first == again
        assert len({tuple(in_order), tuple(first), tuple(other)}) == 3
        assert sorted(in_order) == sorted(first) == sorted(other)
        place = {text: index for index, text in enumerate(in_order)}
        neighbours = sum(abs(place[a] - place[b]) == 1 for a, b in pairwise(first))
        assert neighbours < len(in_order) / 100


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "hub"])
def test_token_ids_are_taken_as_they_are(name: str, tmp_path: Path) -> None:
    rows = [[1, 2, 2**32 - 1], [], None, [0]]
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_text("".join(json.dumps({"ids": row, "text": "no"}) + "\n" for row in rows))
    else:
        table = write(path / "train.parquet") if name == "hub" else path
        pq.write_table(pa.table({"ids": rows}), table)
    found = read(path, tokens_column="ids")
    assert [list(ids) for ids in found] == [row or [] for row in rows]
    assert found[0].dtype == np.uint32
    assert "has no column 'tokens': row 0 has ids" in refused(path, tokens_column="tokens")
    assert "--text-column" in refused(path, text_column="ids")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("a text", "must hold lists of token ids, got str in row 1"),
        ([1.5, 2], "must hold lists of token ids, got a list that holds other things in row 1"),
        (["1"], "must hold lists of token ids, got a list that holds other things in row 1"),
        ([[1]], "must hold lists of token ids, got a list that holds other things in row 1"),
        ([[1], [1, 2]], "must hold lists of token ids, got a list that holds other things"),
        ([1, -1], "must hold token ids from 0 to 4294967295, got -1 in row 1"),
        ([2**32], "must hold token ids from 0 to 4294967295, got 4294967296 in row 1"),
        ([2**70], "must hold lists of token ids, got a list that holds other things in row 1"),
    ],
)
def test_what_is_no_token_id_is_refused(value: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"ids": [1]}\n' + json.dumps({"ids": value}))
    assert reason in refused(path, tokens_column="ids")


def test_plain_text_has_no_token_ids(tmp_path: Path) -> None:
    text = refused(write(tmp_path / "a.txt"), tokens_column="ids")
    assert text.startswith("--tokens-column ids: ")
    assert "is plain text and has no columns" in text


def test_text_file_too_large_for_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", "x" * 1000)
    monkeypatch.setattr("mlsae.base.machine.resources.available_memory", lambda: 1500)
    assert f"reading {path}, which is one document: needs 2 kB, 1.5 kB available" in refused(path)


def test_column_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": 5}')
    assert "must hold text, got int in row 1" in refused(path)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "a.jsonl"
    broken.write_text('{"text": "x"}\n{"text"')
    assert f"{broken}, line 2: not JSON" in refused(broken)
    broken.write_text("[1]")
    assert f"{broken}, line 1: expected a JSON object, got list" in refused(broken)
    latin = tmp_path / "a.txt"
    latin.write_bytes("três".encode("latin-1"))
    assert f"{latin} is not UTF-8 text: byte 0xea at offset 2" in refused(latin)
    table = tmp_path / "a.parquet"
    table.write_bytes(b"no parquet")
    assert f"{table} cannot be read as Parquet" in refused(table)


@pytest.mark.parametrize("name", ["./no/such/place", "/no/such/file.jsonl", "nothing.txt"])
def test_absent_path_is_refused(name: str) -> None:
    assert refused(name) == f"there is no data set {name}; give another path or a hub id"


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\nx")
    assert f"cannot read {path}: expected a file ending in .txt, .jsonl, .parquet" in refused(path)


def test_directory_without_data_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} holds no file; expected .txt, .jsonl" in refused(tmp_path)


@pytest.mark.usefixtures("no_hub")
def test_hub_data_set_without_network_is_refused() -> None:
    text = refused("someone/some-text")
    assert "cannot reach data set 'someone/some-text': no such file or directory here" in text
    assert "give a local .txt, .jsonl or .parquet file" in text


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    table, text = tmp_path / "a.jsonl", tmp_path / "a.txt"
    mark = b"\xef\xbb\xbf"
    table.write_bytes((mark + b'{"text": "x"}\n') * 2)
    text.write_bytes(mark + b"Once")
    assert (read(table), read(text)) == (["x", "x"], ["Once"])


def test_rows_that_python_cannot_hold_are_named_or_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = '{"text": "x", "id": %s}\n'
    path.write_text(row % 1 + row % ("9" * 5000))
    assert read(path) == ["x", "x"]
    path.write_text(row % 1 + row % ("[" * 100_000 + "]" * 100_000))
    assert refused(path) == f"{path}, line 2: brackets are nested too deep to be read"


def test_parquet_rows_that_python_cannot_hold_are_named(tmp_path: Path) -> None:
    path, data = tmp_path / "a.parquet", b"ok \xff"
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 4], "<i4")), pa.py_buffer(data)]
    )
    until = pa.array([2_932_897] * 3, pa.date32())
    texts = pa.chunked_array([pa.array(["a", "b"]), bad])
    pq.write_table(pa.table({"text": texts, "until": until}), path)
    assert refused(path) == (
        f"{path}, row 2: column 'text' is not UTF-8 text: byte 0xff at offset 3; convert it first"
    )
    assert "has no column 'body': row 0 has text, until; name" in refused(path, text_column="body")
    assert refused(path, text_column="until") == (
        f"{path}, row 0: column 'until' cannot be read: date value out of range"
    )


def test_pointers_of_git_lfs_are_no_text(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for name in ("a.txt", "a.jsonl", "a.jsonl.zst", "a.parquet"):
        path = write(tmp_path / name, pointer)
        assert refused(path) == (
            f"{path} is a pointer of Git LFS, not the text itself; fetch that with git lfs pull"
        )


def test_wide_window_is_no_damage(tmp_path: Path) -> None:
    """A frame whose header asks for a window of 2 GiB, as `zstd --long=31` writes it."""
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x04\xa8\x11\x00\x00{}\xff\xff\xff\xff")
    assert refused(path) == (
        f"{path} was compressed with a window over 128 MiB, as by zstd --long=31; decompress it "
        f"first, by zstd -d --long=31 {path}"
    )
