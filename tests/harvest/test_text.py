"""Text comes from files and hub data sets alike, and what is no text is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlsae.base.errors import InputError
from mlsae.harvest.text import TextConfig, open_sources

TEXTS = ["one", "", "two\nlines", "três"]


def read(dataset: Path | str, **settings: Any) -> list[Any]:
    (source,) = open_sources(TextConfig(datasets=(str(dataset),), **settings))
    return list(source.documents)


def refused(dataset: Path | str, **settings: Any) -> str:
    with pytest.raises(InputError) as info:
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
    (source,) = open_sources(TextConfig(datasets=(str(path),)))
    assert next(source.documents) == "good"


def test_unknown_split_is_refused(hub_directory: Path) -> None:
    text = refused(hub_directory, split="validation")
    assert f"data set {hub_directory}, split 'validation', cannot be read" in text


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
