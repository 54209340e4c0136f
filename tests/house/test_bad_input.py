"""Mistakes of users, through the command line: one line, exit status 1, nothing half-made."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlsae.base.files import read_sealed, seal
from mlsae.cli import main
from mlsae.demo import text_path
from mlsae.store import create, open_store

TRAIN = ["--num-latents", "64", "-k", "4", "--batch-size", "64", "--validation-fraction", "0.2"]


def command(*arguments: object) -> Result:
    """Run `mlsae` with these arguments in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def walked(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a store `acts` and an SAE `sae`, made by the commands themselves."""
    directory = tmp_path_factory.mktemp("walked")
    harvest = ["harvest", "--model", demo_model, "--dataset", text_path("held_out")]
    sizes = ["--context-length", 32, "--max-tokens", 640, "--batch-size", 4, "--device", "cpu"]
    made = command(*harvest, *sizes, "--out", directory / "acts")
    assert made.exit_code == 0, made.output
    made = command("train", "--cache", directory / "acts", "--out", directory / "sae", *TRAIN)
    assert made.exit_code == 0, made.output
    return directory


def refused(result: Result, message: str, *absent: Path) -> None:
    """One line on stderr with the message, exit status 1, and none of `absent` made."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.stderr
    for path in absent:
        assert not path.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "./no/such/model"}, "there is no model directory ./no/such/model"),
        ({"--dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--text-column": "body"}, "'body'"),
        ({"--dataset": "EMPTY"}, "the data set is empty: it holds no text"),
        ({"--context-length": "1000"}, "longer than the 256 positions of model"),
        ({"--device": "cuda"}, "CUDA"),
        ({"--layers": "0,9"}, "has no layer 9: its layers are 0 to 5"),
        ({"--max-tokens": "10"}, "is less than one sequence of 32 tokens"),
        ({"--max-disk": "10kB"}, "over --max-disk 10 kB"),
        (
            {"--encoding": "int4"},
            "--encoding must be auto, float16, bfloat16, float32, int8, float16",
        ),
    ],
)
def test_harvest(demo_model: Path, tmp_path: Path, changes: dict[str, str], message: str):
    """Each is refused before a store is begun."""
    (tmp_path / "empty.jsonl").write_text("")
    out = tmp_path / "acts"
    options = {
        "--model": demo_model,
        "--dataset": text_path("held_out"),
        "--context-length": 32,
        "--max-tokens": 640,
        "--device": "cpu",
        **changes,
        "--out": out,
    }
    if options["--dataset"] == "EMPTY":
        options["--dataset"] = tmp_path / "empty.jsonl"
    refused(command("harvest", *(x for pair in options.items() for x in pair)), message, out)


@pytest.mark.parametrize("name", ["some-user/some-model", "not-a-model"])
def test_a_hub_model_without_a_network(monkeypatch, tmp_path: Path, name: str):
    """Nothing listens at the hub's address: the line says what was looked for and what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = command(
        "harvest", "--model", name, "--dataset", text_path("held_out"), "--out", tmp_path / "acts"
    )
    refused(result, f"cannot find model '{name}'", tmp_path / "acts")


def test_an_out_that_holds_another_plan(demo_model: Path, walked: Path):
    """The store is left as it was."""
    before = open_store(walked / "acts").store_id
    harvest = ["harvest", "--model", demo_model, "--dataset", text_path("held_out")]
    sizes = ["--context-length", 64, "--max-tokens", 640, "--device", "cpu"]
    refused(
        command(*harvest, *sizes, "--out", walked / "acts"),
        "holds a store of another plan (context_length: 32 there, 64 here); ",
    )
    assert open_store(walked / "acts").store_id == before


def copy(source: Path, target: Path) -> Path:
    """A store to be harmed."""
    shutil.copytree(source, target)
    return target


def test_train_and_analyze_refuse_stores_that_are_not_whole(walked: Path, tmp_path: Path):
    """No store, an incomplete one, a damaged one, one of a newer version."""
    absent = tmp_path / "absent"
    incomplete = copy(walked / "acts", tmp_path / "incomplete")
    (incomplete / "complete.json").unlink()
    (incomplete / "commits/00000.json").unlink()
    newer = copy(walked / "acts", tmp_path / "newer")
    plan = read_sealed(newer / "plan.json")
    (newer / "plan.json").write_bytes(seal({**plan, "schema_version": "2.0"}))
    damaged = copy(walked / "acts", tmp_path / "damaged")
    shard = damaged / "activations/resid_post/3/c.0.0"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    for cache, message in (
        (absent, "absent does not exist; expected an activation store"),
        (walked, "is not an activation store: it has no plan.json"),
        (incomplete, "incomplete is incomplete: 0 of 1 shard is committed"),
        (newer, "the store follows schema 2.0, this mlsae reads 1.0; upgrade mlsae"),
        (damaged, "(shard 0 of activations/resid_post/3) is damaged: the checksum of its chunk"),
    ):
        out = tmp_path / "out"
        refused(command("train", "--cache", cache, "--out", out, *TRAIN), message)
        assert not (out / "sae.safetensors").exists()
        shutil.rmtree(out, ignore_errors=True)
        analyze = ["analyze", "--cache", cache, "--sae", walked / "sae", "--out", out]
        refused(command(*analyze), message, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--layers", "0,7"], "does not hold layer 7; it has 0, 1, 2, 3, 4, 5"),
        (["--num-latents", "2"], "k"),
        (["--site", "mlp_out"], "does not hold site mlp_out"),
        (["--device", "cuda"], "CUDA"),
        (["--batch-size", "3"], "--batch-size must be at least the number of layers: got 3"),
        (["--num-latents", "1T"], "not enough memory for training (window "),
        (["--validation-fraction", "1"], "validation"),
        (["--skip-positions", "17"], "skip_positions must be 0 to 16"),
        (["--loss-space", "log"], "log"),
    ],
)
def test_train(walked: Path, tmp_path: Path, changes: list[str], message: str):
    """Refused before a run is begun."""
    out = tmp_path / "sae"
    settings = ["--cache", walked / "acts", "--out", out, *TRAIN, *changes]
    refused(command("train", *settings), message, out)


def test_an_sae_and_a_store_that_do_not_match(walked: Path, sample, tmp_path: Path):
    """Another width; another transformer of the same width."""
    out = tmp_path / "analysis"
    analyze = ["analyze", "--sae", walked / "sae", "--out", out, "--cache"]
    refused(command(*analyze, sample.path), "the SAE's d_in is 64, the store's d_model 20", out)
    tokens = np.arange(640) % 100
    with create(
        tmp_path / "other", tokens=tokens, context_length=32, layers=range(6), d_model=64
    ) as writer:
        values = np.random.default_rng(0).normal(size=(640, 64)).astype(np.float32)
        writer.append({("resid_post", layer): values for layer in range(6)})
    refused(command(*analyze, tmp_path / "other"), "was trained on activations of transformer", out)
    refused(command("analyze", "--cache", walked / "acts", "--sae", walked, "--out", out), "", out)


def test_an_out_that_holds_something_else(walked: Path, tmp_path: Path):
    """A thesis is not overwritten by an SAE or an analysis, nor one run by another."""
    (tmp_path / "thesis.tex").write_text("precious")
    cache = walked / "acts"
    refused(command("train", "--cache", cache, "--out", tmp_path, *TRAIN), "thesis.tex")
    analyze = ["analyze", "--cache", cache, "--sae", walked / "sae", "--out"]
    refused(command(*analyze, tmp_path), "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    another = ["train", "--cache", cache, "--out", walked / "sae", *TRAIN, "--seed", 1]
    refused(command(*another), "seed")
    training = json.loads((walked / "sae" / "training.json").read_text())
    assert training["settings"]["seed"] == 0
