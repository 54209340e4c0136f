"""An analysis directory appears whole, and nothing but an analysis is replaced."""

from pathlib import Path
from typing import Any

import pytest

from mlsae.analyze.results.directory import KIND, SUMMARY, check_replaceable, read_summary
from mlsae.base.directories import content_of, held, staged
from mlsae.base.errors import InputError
from mlsae.base.files import seal


def _analysis(path: Path, **more: Any) -> None:
    path.mkdir()
    (path / SUMMARY).write_bytes(seal({"kind": KIND, **more}))


def _names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_the_directory_appears_whole_and_alone(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "out") as partial:
        (partial / "a.txt").write_text("new")
        assert content_of(tmp_path / "deep" / "out") == []
    assert _names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "a.txt").read_text() == "new"


def test_a_rerun_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    _analysis(tmp_path / "out")
    with staged(tmp_path / "out") as partial:
        (partial / "b.txt").write_text("new")
    assert _names(tmp_path) == ["out"]
    assert _names(tmp_path / "out") == ["b.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    _analysis(tmp_path / "out")

    def fail() -> None:
        with staged(tmp_path / "out") as partial:
            (partial / "b.txt").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert _names(tmp_path) == ["out"]
    assert _names(tmp_path / "out") == [SUMMARY]


def test_a_failure_leaves_no_parent_that_was_made(tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "a" / "b" / "out"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert _names(tmp_path) == []


def test_absent_empty_and_analysis_directories_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _analysis(tmp_path / "old")
    for name in ("absent", "empty", "old"):
        check_replaceable(tmp_path / name)


def test_other_things_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    _analysis(tmp_path / "mixed")
    (tmp_path / "mixed" / "notes.md").write_text("")
    for name, message in (
        ("file", "--out .*/file is a file; give a directory"),
        ("other", r"holds other things than an analysis \(thesis.tex\); give a directory that is "),
        ("mixed", "holds an analysis, which would be replaced, and notes.md, which mlsae did not "),
    ):
        with pytest.raises(InputError, match=message):
            check_replaceable(tmp_path / name)


def test_a_summary_of_another_kind_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no analysis: it has no summary.json"):
        read_summary(tmp_path)
    (tmp_path / SUMMARY).write_bytes(seal({"kind": "poem"}))
    with pytest.raises(
        InputError, match=r"the kind in its summary.json is 'poem', expected 'mlsae"
    ):
        read_summary(tmp_path)
    (tmp_path / SUMMARY).write_bytes(seal({"kind": KIND}).replace(b"mlsae", b"mlsAe"))
    with pytest.raises(InputError, match=r"summary.json is damaged: .* with mlsae analyze"):
        read_summary(tmp_path)


def test_files_of_somebody_else_inside_the_folders_are_refused(tmp_path: Path) -> None:
    """Folders are replaced whole, so what the summary does not name is looked for in them too."""
    parts = {"parts": [{"path": "layer-0/part-0.parquet"}]}
    _analysis(tmp_path / "out", figures=["figures/a.png"], events=parts)
    for name in ("figures/a.png", "events/layer-0/part-0.parquet", "figures/.DS_Store"):
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    check_replaceable(tmp_path / "out")
    (tmp_path / "out" / "figures" / "mine.png").touch()
    with pytest.raises(InputError, match=r"and figures/mine\.png, which mlsae did not write: move"):
        check_replaceable(tmp_path / "out")


def test_an_analysis_that_was_killed_while_it_was_published_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out" / "new-0123abcd.partial").mkdir(parents=True)
    (tmp_path / "out" / "layers.parquet").touch()
    check_replaceable(tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"holds other things than an analysis"):
        check_replaceable(tmp_path / "out")


def test_an_analysis_in_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "acts" / "commits").mkdir(parents=True)
    (tmp_path / "acts" / "plan.json").touch()
    with pytest.raises(InputError, match=r"--out .*/acts/an lies in the activation store"):
        check_replaceable(tmp_path / "acts" / "an")


def test_a_directory_that_another_run_writes_is_refused_at_once(tmp_path: Path) -> None:
    with held(tmp_path / "out"), pytest.raises(InputError, match="is being written by process"):
        check_replaceable(tmp_path / "out")
