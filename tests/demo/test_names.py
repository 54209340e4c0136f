"""The transformer and the text that come with the package have names."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from mlsae.analyze import AnalyzeConfig
from mlsae.base.embedded import embedded_text
from mlsae.cli import main
from mlsae.demo import model_path, text_path
from mlsae.harvest import HarvestConfig


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("demo", str(text_path("train"))),
        ("demo:train", str(text_path("train"))),
        ("demo:held_out", str(text_path("held_out"))),
        ("demo:0.5", f"{text_path('train')}:0.5"),
        ("demo:held_out:0.5", f"{text_path('held_out')}:0.5"),
        ("./demo", "./demo"),
        ("demo:other", "demo:other"),
        ("someone/demo", "someone/demo"),
    ],
)
def test_names_of_text(name: str, place: str):
    """With the share of a mixture; a directory of that name is `./demo`."""
    assert embedded_text(name) == place


def test_settings_resolve_them(tmp_path: Path):
    """Settings of a harvest and of an analysis take the names, in Python too."""
    harvest = HarvestConfig(model="demo", dataset=("demo:train:3", "./b:1"), out=tmp_path)
    assert harvest.model == str(model_path())
    assert harvest.datasets == (f"{text_path('train')}:3", "./b:1")
    assert HarvestConfig(model="./demo", dataset="demo", out=tmp_path).model == "./demo"
    analysis = AnalyzeConfig(cache="acts", sae=tmp_path, out=tmp_path, model=Path("demo"))
    assert analysis.model == model_path()


def test_the_command_line_knows_them(tmp_path: Path):
    """A dry run of both names reads the model's configuration and the text."""
    words = ["--model", "demo", "--dataset", "demo:held_out", "--max-tokens", "2k"]
    options = ["--context-length", "64", "--out", str(tmp_path / "acts"), "--dry-run"]
    done = CliRunner().invoke(main, ["harvest", *words, *options])
    assert done.exit_code == 0, done.output
    assert "31 sequences" in done.output or "1,984 tokens" in done.output, done.output
    assert not (tmp_path / "acts").exists()
