"""Every file of a directory is read, or a line says which is not and why."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mlsae.base.errors import InputError
from mlsae.harvest.text.sources import TextSettings, open_sources


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def make(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def read(dataset: Path, **settings: Any) -> tuple[list[Any], str | None]:
    (source,) = open_sources(TextSettings(dataset=str(dataset), **settings))
    note = source.note
    return list(source.documents), note and note.replace(str(dataset), "DIR")


def refused(dataset: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as info:
        read(dataset, **settings)
    return str(info.value).replace(str(dataset), "DIR")


def test_linked_folders_are_followed_and_linked_files_read_once(tmp_path: Path) -> None:
    texts = make(tmp_path / "texts", {"a.txt": "a"})
    (texts / "more").symlink_to(make(tmp_path / "elsewhere", {"b.txt": "b", "deep/c.txt": "c"}))
    (texts / "z.txt").symlink_to("a.txt")
    os.link(texts / "a.txt", texts / "again.txt")
    assert read(texts) == (
        ["a", "b", "c"],
        "packed from DIR: a.txt, more/b.txt, more/deep/c.txt; "
        "passed over again.txt, z.txt (the same file as a.txt)",
    )


def test_links_to_nothing_and_around_themselves_are_refused(tmp_path: Path) -> None:
    make(tmp_path, {"a.txt": "a"})
    (tmp_path / "b.jsonl").symlink_to("/nonexistent/b.jsonl")
    assert refused(tmp_path) == (
        "DIR/b.jsonl cannot be read: it is a link to nothing; mend or remove it"
    )
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert "DIR/loop is a link to a folder around it; remove the link" in refused(tmp_path)
    (tmp_path / "loop").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    assert "DIR/pipe.txt cannot be read: it is no file" in refused(tmp_path)


def test_readme_changes_no_document(tmp_path: Path) -> None:
    chapters = {f"chapter{i}.txt": "one\n\ntwo" for i in range(3)}
    assert read(make(tmp_path, chapters))[0] == ["one\n\ntwo"] * 3
    readme = "---\nlicense: mit\n---\n# My book\nconfigs:\n"
    documents, note = read(make(tmp_path, {"README.md": readme, "LICENSE": "free"}))
    assert documents == ["one\n\ntwo"] * 3
    assert note == (
        "packed from DIR: chapter0.txt, chapter1.txt, chapter2.txt; "
        "passed over LICENSE, README.md (no text)"
    )


@pytest.mark.parametrize("name", ["test.txt", "train.txt", "validation/x.txt", "dev-1.txt"])
def test_one_file_named_by_a_split_among_others_is_a_file(name: str, tmp_path: Path) -> None:
    documents, _ = read(make(tmp_path, {name: "x", "art.txt": "y"}))
    assert sorted(documents) == ["x", "y"]


def test_two_splits_keep_others_out_and_say_so(tmp_path: Path) -> None:
    make(
        tmp_path,
        {"test.jsonl": lines("b"), "train/a.jsonl": lines("a"), "more.jsonl": lines("c")},
    )
    assert read(tmp_path) == (
        ["a"],
        "packed from DIR: train/a.jsonl; passed over more.jsonl (no split); passed over test.jsonl "
        "(split test)",
    )
    assert read(tmp_path, split="eval")[0] == ["b"]
    assert "has no split 'validation': its files are named test and train" in refused(
        tmp_path, split="dev"
    )


def test_other_kinds_beside_a_split_are_passed_over(tmp_path: Path) -> None:
    make(tmp_path, {"train.jsonl": lines("a"), "LICENSE-mine.txt": "free", "sources.json": "{}"})
    assert read(tmp_path) == (
        ["a"],
        "packed from DIR: train.jsonl; passed over LICENSE-mine.txt, sources.json (another kind of "
        "file)",
    )


def test_one_split_is_chosen_by_name_alone(tmp_path: Path) -> None:
    make(tmp_path, {"test.jsonl": lines("b")})
    assert "has no split 'train': its files are named test, such as test.jsonl" in refused(tmp_path)
    make(tmp_path, {"other.jsonl": lines("a")})
    assert read(tmp_path)[0] == ["a", "b"]
    assert read(tmp_path, split="test")[0] == ["b"]


def test_missing_parts_of_a_series_are_named(tmp_path: Path) -> None:
    make(tmp_path, {"train-00000-of-00003.jsonl": lines("a"), "b/x-00002-of-00002.jsonl": ""})
    assert read(tmp_path)[1] == (
        "packed from DIR: b/x-00002-of-00002.jsonl, train-00000-of-00003.jsonl; missing: "
        "b/x-00001-of-00002.jsonl, train-00001-of-00003.jsonl, train-00002-of-00003.jsonl"
    )
    make(tmp_path, {f"train-{i:05d}-of-00003.jsonl": "" for i in (1, 2)})
    make(tmp_path, {"b/x-00001-of-00002.jsonl": ""})
    assert "missing" not in str(read(tmp_path)[1])


@pytest.mark.parametrize("card", [True, False])
def test_signs_of_patterns_in_a_name_are_letters(card: bool, tmp_path: Path) -> None:
    """With a card the library reads, which takes paths for patterns."""
    mine = make(tmp_path / "run[1]", {"train.jsonl": lines("mine")})
    make(tmp_path / "run1", {"train.jsonl": lines("yours", "yours")})
    if card:
        readme = "---\nconfigs:\n- config_name: x\n  data_files: train.jsonl\n---\n"
        make(mine, {"README.md": readme})
    documents, note = read(mine)
    assert documents == ["mine"]
    said = "split train of the files that its README.md names" if card else "train.jsonl"
    assert note == f"packed from DIR: {said}"


def test_colon_in_a_path_that_is_there_is_no_weight(tmp_path: Path) -> None:
    dump = make(tmp_path / "dump-12:30", {"a.jsonl": lines("a")})
    assert read(dump)[0] == ["a"]
    (source,) = open_sources(TextSettings(dataset=(f"{dump}:0.5",)))
    assert list(source.documents) == ["a"]


def test_compressed_files_with_a_card_need_no_other_package(tmp_path: Path) -> None:
    """Files of two frames: some readers stop after the first."""
    card = "---\nconfigs:\n- config_name: x\n  data_files: a.jsonl.zst\n---\n"
    make(tmp_path, {"README.md": card})
    frames = [pa.compress(lines(text).encode(), codec="zstd", asbytes=True) for text in ("a", "b")]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path)[0] == ["a", "b"]


def test_pipes_are_refused_for_what_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe") == (
        "DIR is a pipe or device, which cannot be read again where a harvest goes on; write the "
        "text to a file first, such as text.jsonl"
    )
    assert "there is no data set ~nobody/x" in refused(Path("~nobody/x")).replace(
        "DIR", "~nobody/x"
    )
