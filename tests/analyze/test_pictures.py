"""Figures and page are made once the tables are safe, and cost nothing else."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mlsae.analyze import load
from mlsae.analyze.results.directory import check_replaceable
from mlsae.analyze.results.figures import registry
from mlsae.analyze.results.page import pictures
from mlsae.analyze.results.page.pictures import make_pictures, planned_figures
from mlsae.analyze.results.text.summary import render
from mlsae.base.files import partial_path


@pytest.fixture
def bare(drawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The analysis without figures and page; `sparsity` is the only figure that is drawn."""
    shutil.copytree(drawn.analysis.path, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "figures")
    (tmp_path / "out" / "index.html").unlink()
    monkeypatch.setattr(registry, "FIGURES", {"sparsity": registry.FIGURES["sparsity"]})
    return tmp_path / "out"


def _content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_pictures_are_added_and_what_is_missing_is_named(bare: Path) -> None:
    before = _content(bare)
    # As a process that was killed while it drew.
    (bare / "figures").mkdir()
    partial_path(bare / "figures" / "sparsity.png").touch()
    check_replaceable(bare)
    make_pictures(bare)
    after = _content(bare)
    added = {"figures/sparsity.png", "figures/sparsity.svg", "index.html"}
    assert after.keys() - before.keys() == added
    assert before.items() <= after.items()
    page = after["index.html"].decode()
    assert "Figures that could not be drawn: figures/reconstruction.png, " in page
    assert f"figures   {bare / 'figures'} (1)" in render(load(bare))


@pytest.mark.parametrize("broken", ["page", "matplotlib"])
def test_an_error_becomes_a_warning(
    broken: str, bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ImportError("no module there")

    before = _content(bare)
    if broken == "page":
        monkeypatch.setattr(pictures, "write_page", fail)
    else:
        monkeypatch.setattr(registry, "draw_all", fail)
    make_pictures(bare)
    what = {"page": bare / "index.html", "matplotlib": bare / "figures"}[broken]
    assert f"warning: {what} could not be made (ImportError: no module there)" in (
        capsys.readouterr().err
    )
    assert (bare / "index.html").exists() == (broken != "page")
    assert before.items() <= _content(bare).items()
    assert ("\npage  " in render(load(bare))) == (broken != "page")


def test_no_figure_is_planned_where_none_can_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> list[str]:
        raise ImportError("no matplotlib")

    monkeypatch.setattr(registry, "files", fail)
    assert planned_figures({}) == []
    assert "warning: figures could not be made (ImportError: no matplotlib)" in (
        capsys.readouterr().err
    )
