"""The commands that a summary names make the same store, SAE and tables again."""

import dataclasses
import html
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

from mlsae.analyze import AnalyzeConfig, load
from mlsae.analyze.origin import command_lines
from mlsae.analyze.pairing import pair
from mlsae.analyze.results.page.render import render
from mlsae.analyze.results.tables import TABLES
from mlsae.base.files import read_sealed, seal
from mlsae.cli import main
from mlsae.demo import text_path
from mlsae.store import open_store


def command(words: list[str]) -> None:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output


def again(line: str, out: Path) -> None:
    """The command of a line, with another --out."""
    program, *words = shlex.split(line)
    assert program == "mlsae"
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    command([*words, "--out", str(out)])


@pytest.mark.parametrize(
    "harvest",
    [
        "--max-tokens 480 --context-length 24 --layers 0,2 --encoding float32",
        "--max-tokens 480 --context-length 24 --layers 1 --packing document --isolate-documents "
        "--keep-positions 12 --keep-seed 3 --encoding int8-zstd --init rerandomized --init-seed 2",
    ],
)
def test_the_commands_make_it_all_again(
    demo_model: Path, tmp_path: Path, harvest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory whose name has to be quoted."""
    place = tmp_path / "a 'place'"
    texts = [place / "texts", place / "more.jsonl"]
    texts[0].mkdir(parents=True)
    lines = text_path("held_out").read_text("utf-8").splitlines(keepends=True)
    (texts[0] / "a.jsonl").write_text("".join(lines[:3]), "utf-8")
    texts[1].write_text(json.dumps({"text": "for value in range(10): return self " * 90}) + "\n")
    words = ["harvest", "--model", str(demo_model), "--batch-size", "3", "--device", "cpu"]
    words += ["--dataset", f"{texts[0]}:0.75", "--dataset", f"{texts[1]}:0.25"]
    command([*words, *harvest.split(), "--out", str(place / "acts")])
    train = ["train", "--cache", str(place / "acts"), "--out", str(place / "sae"), "-k", "3"]
    sizes = ["--num-latents", "32", "--batch-size", "64", "--validation-fraction", "0.2"]
    command([*train, *sizes, "--seed", "5", "--device", "cpu"])
    analyze = ["analyze", "--cache", str(place / "acts"), "--sae", str(place / "sae")]
    analyze += ["--rows", "train", "--max-tokens", "240", "--batch-size", "100"]
    analyze += ["--no-figures"]
    command([*analyze, "--out", str(place / "out")])
    found = load(place / "out")
    named = found.summary["commands"]
    monkeypatch.chdir(tmp_path)
    for stage in ("harvest", "train", "analyze"):
        (line,) = named[stage]
        again(line, tmp_path / stage)
    old, new = open_store(place / "acts"), open_store(tmp_path / "harvest")
    assert (new.plan_id, new.store_id) == (old.plan_id, old.store_id)
    weights = [path / "sae.safetensors" for path in (place / "sae", tmp_path / "train")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    same = load(tmp_path / "analyze")
    # Figures are functions of tables and the summary, which the page shows.
    for name in TABLES:
        tables = [getattr(analysis, name) for analysis in (same, found)]
        again_, before = (t if isinstance(t, pa.Table) else t.to_table() for t in tables)
        assert again_.equals(before), name
    assert same.page.read_bytes() == found.page.read_bytes()


def test_what_cannot_be_made_again_says_why(
    sample: Any, sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    sae = sae_maker(sample.path, settings={})
    analyze = ["analyze", "--no-figures", "--cache"]
    command([*analyze, str(sample.path), "--sae", str(sae), "--out", str(tmp_path / "a")])
    named = load(tmp_path / "a").summary["commands"]
    assert named["harvest"] == f"{sample.path} was not made by mlsae harvest"
    assert named["train"] == f"{sae} has lost the run.yaml of its training"
    command(["store", "copy", str(sample.path), str(tmp_path / "few"), "--rows", "240"])
    shutil.rmtree(sae)
    sae = sae_maker(tmp_path / "few")
    command([*analyze, str(tmp_path / "few"), "--sae", str(sae), "--out", str(tmp_path / "b")])
    named = load(tmp_path / "b").summary["commands"]
    assert named["harvest"] == f"{tmp_path / 'few'} was copied from another store, not harvested"
    assert named["train"] == f"{sae} was not made by mlsae train"


def test_a_harvest_that_does_not_say_all_of_itself(
    harvested: Callable[..., Path], sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """As the records of other versions may not."""
    store = harvested()
    (record,) = (store / "provenance").glob("*.json")
    content = read_sealed(record)
    del content["datasets"]
    record.write_bytes(seal(content))
    sae = sae_maker(store)
    found = command_lines(
        pair(store, sae, torch.device("cpu")), AnalyzeConfig(cache=store, sae=sae, out=tmp_path)
    )
    assert found["harvest"] == f"{store} does not say all of how it was harvested"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rows": "all", "max_tokens": 480, "context_tokens": (3, 2), "figures": False},
        {"prompts": ("a text", '- another\'s \n"$HOME"', "x"), "examples": 0, "samples": 0},
        {"cache": ("one", "s3://two"), "prompt_file": Path("texts"), "device": "cpu"},
        {"model": Path("-model"), "to_delphi": Path("delphi"), "cache_size": 10, "batch_size": 9},
    ],
)
def test_the_page_names_options_that_the_command_line_reads_back(
    changes: dict[str, Any], drawn: Any, world: Any
) -> None:
    """As a shell takes the text that a reader copies from it."""
    config = AnalyzeConfig(
        **{"cache": ("acts",), "sae": Path("an sae"), "out": Path("o"), **changes}
    )
    analysis = drawn.analysis
    pairing = pair(world.store, Path(analysis.summary["sae"]), torch.device("cpu"))
    line = command_lines(pairing, config)["analyze"]
    summary = {**analysis.summary, "commands": {"analyze": line}}
    page = render(dataclasses.replace(analysis, summary=summary))
    (text,) = re.findall(r"<pre[^>]*>(mlsae analyze.*?)</pre>", page, re.DOTALL)
    echoed = subprocess.run(
        ["/bin/sh", "-c", html.unescape(text).replace("mlsae", "printf '%s\\0'", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    words = echoed.stdout.split("\0")[1:-1]
    command = main.commands["analyze"]
    given = command.make_context("analyze", words, parent=click.Context(main)).params
    assert AnalyzeConfig(**given) == dataclasses.replace(config, out=Path("analysis"))
