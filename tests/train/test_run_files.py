"""Options of a run from lists, from YAML files, and back to one that repeats it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from mlsae.base.errors import InputError
from mlsae.cli import main
from mlsae.store import open_corpus
from mlsae.train.config import parse_training_layers
from mlsae.train.options import make_sweep
from mlsae.train.plan import make_plans

COMMON = "--batch-size 60 --validation-fraction 0.1 --device cpu --max-rows 300"


def train(*words: object) -> Any:
    return CliRunner().invoke(main, ["train", *map(str, words)])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0-2,5", ((0, 1, 2, 5), False)),
        ("each", (None, True)),
        ("each, 3,0", ((0, 3), True)),
    ],
)
def test_layers_may_be_asked_for_each(text: str, found: Any) -> None:
    """Beside a list of them, or of all."""
    assert parse_training_layers(text) == found


def test_layers_that_are_none_are_refused() -> None:
    """In one line that says what else could stand there."""
    with pytest.raises(InputError, match=r"expected layers such as .* got 'every'; `each` adds an"):
        parse_training_layers("every")


def test_lists_and_repeats_are_a_product(sample: Any, tmp_path: Path) -> None:
    """In the order given."""
    words = ["--cache", sample.path, "--out", tmp_path / "out", *COMMON.split()]
    done = train(*words, "-k", "2,3", "-k", "4", "--lr", "1e-3,2e-3", "--num-latents", "40")
    assert done.exit_code == 0, done.output
    names = [line.split()[0] for line in done.output.splitlines() if line.startswith("k")]
    assert names == [f"k{k}-lr{lr}" for k in (2, 3, 4) for lr in ("0.001", "0.002")]


def test_a_file_gives_options_and_the_command_line_comes_first(sample: Any, tmp_path: Path) -> None:
    """Numbers, texts and lists; run.yaml of what came of it repeats it."""
    content = {
        "cache": str(sample.path),
        "num-latents": 40,
        "k": [2, 3],
        "lr": "1e-3",
        "layers": [0, 3],
        "batch_size": 60,
        "max-rows": "300",
        "validation-fraction": 0.1,
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    first, again = tmp_path / "first", tmp_path / "again"
    done = train("--config", tmp_path / "mine.yaml", "--out", first, "-k", "4")
    assert done.exit_code == 0, done.output
    text = (first / "run.yaml").read_text()
    given = {**content, "k": 4, "lr": 0.001, "max-rows": 300, "out": str(first)}
    given |= {"batch-size": given.pop("batch_size"), "cache": [given["cache"]]}
    assert yaml.safe_load(text) == given
    for default in ("site: resid_post", "data-seed: 0", "lr-decay: 0.2", "architecture: topk"):
        assert f"\n# {default}\n" in text
    done = train("--config", first / "run.yaml", "--out", again)
    assert done.exit_code == 0, done.output
    ours, theirs = (load_file(path / "sae.safetensors") for path in (first, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {**yaml.safe_load((again / "run.yaml").read_text()), "out": str(first)} == given


def test_defaults_of_a_run_are_no_choices(sample: Any, tmp_path: Path) -> None:
    """An option beside run.yaml changes whatever follows from it."""
    base = tmp_path / "base"
    words = "-R 2 -k 3 --batch-size 60 --validation-fraction 0.1 --device cpu"
    done = train("--cache", sample.path, "--out", base, *words.split())
    assert done.exit_code == 0, done.output
    found = {
        "-R 3": {"num_latents": 60},
        "--num-latents 64": {"num_latents": 64, "lr": 2e-4 * 2**4 * (2**14 / 20) ** 0.5},
        "--max-rows 180": {"num_steps": 3},
        "--schedule constant": {"lr_decay": 0.0},
        "--schedule cosine": {"lr_decay": 0.9},
        "--seed 5": {"seed": 5, "data_seed": 5},
    }
    for beside, expected in found.items():
        given = ["--config", str(base / "run.yaml"), *beside.split()]
        with main.commands["train"].make_context("train", given) as context:
            (plan,) = make_plans(make_sweep(context.params), open_corpus(sample.path))
        settings = plan.settings()
        assert {name: settings[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("content", "words", "kept"),
    [
        ("num-latents: 40", "-R 2", {"num_latents": (), "expansion_factor": (2,)}),
        ("expansion-factor: 2", "--num-latents 40", {"expansion_factor": ()}),
        ("epochs: 2", "--max-rows 300", {"epochs": None}),
        ("lr-decay: 0.5", "--schedule constant", {"lr_decay": ()}),
        ("lr-decay: 0.5", "--schedule linear", {"lr_decay": (0.5,)}),
        ("{architecture: relu, l1: 3}", "--architecture topk", {"l1": ()}),
        ("{architecture: relu, l1: 3}", "--architecture relu", {"l1": (3.0,)}),
        ("{normalize: none, layer-scale: sqrt}", "--normalize center", {"layer_scale": ()}),
        ("{k: 3, lr: 1e-3}", "--num-latents 40 -k 4", {"lr": (0.001,), "k": (4,)}),
    ],
)
def test_command_line_wins_over_what_makes_no_sense_beside_it(
    content: str, words: str, kept: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(content)
    command = main.commands["train"]
    given = ["--config", str(tmp_path / "run.yaml"), "--cache", "a", "--out", "b", *words.split()]
    with command.make_context("train", given) as context:
        assert {name: context.params[name] for name in kept} == kept


def test_the_file_of_a_sweep_repeats_all_of_it(sample: Any, tmp_path: Path) -> None:
    """Lists, `each`, and the settings that follow from them."""
    first, again = tmp_path / "first", tmp_path / "again"
    done = train(
        "--cache",
        sample.path,
        "--out",
        first,
        *COMMON.split(),
        "-R",
        "2,3",
        "--layers",
        "0,1,each",
        "-k",
        "2",
    )
    assert done.exit_code == 0, done.output
    done = train("--config", first / "run.yaml", "--out", again)
    assert done.exit_code == 0, done.output
    saes = sorted(path.parent.name for path in first.glob("*/sae.safetensors"))
    assert saes == [f"R{r}-{of}" for r in (2, 3) for of in ("all", "layer0", "layer1")]
    for name in saes:
        assert (first / name / "run.json").read_bytes() == (again / name / "run.json").read_bytes()
        ours, theirs = (load_file(path / name / "sae.safetensors") for path in (first, again))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning: 3", "run.yaml gives 'learning', which is no option; expected "),
        ("- 3", "run.yaml must map options to values, such as `batch-size: 4096`"),
        ("k: [", "run.yaml is no YAML file: while parsing"),
        ("k: few", "expected a number of items such as 10M, 1e7 or 16384, got 'few'"),
    ],
)
def test_a_file_that_is_none_is_refused(
    text: str, message: str, sample: Any, tmp_path: Path
) -> None:
    """As wrong usage, and nothing is made."""
    (tmp_path / "run.yaml").write_text(text)
    words = ["--cache", sample.path, "--out", tmp_path / "out"]
    done = train("--config", tmp_path / "run.yaml", *words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """By name."""
    done = train("--config", tmp_path / "run.yaml")
    assert done.exit_code == 2
    assert "run.yaml does not exist" in " ".join(done.output.split())
