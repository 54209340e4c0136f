"""The directory of a run: held while it trains, outside every store, others' files left alone."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlsae.base.directories import held
from mlsae.base.errors import InputError
from mlsae.cli import main
from mlsae.store.tools.verify import verify
from mlsae.train import TrainConfig, run
from mlsae.train.running.checkpoint import Checkpoints

SETTINGS: dict[str, Any] = {
    "num_latents": 40,
    "k": 2,
    "batch_size": 60,
    "max_rows": 120,
    "validation_fraction": 0.1,
    "device": "cpu",
}


def test_a_directory_that_another_run_holds_is_refused(sample: Any, tmp_path: Path) -> None:
    """Also with --resume, which would take its files away."""
    out = tmp_path / "out"
    for resume in (False, True):
        with (
            held(out),
            pytest.raises(InputError, match=rf"^{out} is being written by process \d+ on "),
        ):
            run(TrainConfig(cache=sample.path, out=out, resume=resume, **SETTINGS))
    assert not out.exists()


def test_a_run_in_the_store_that_it_reads_is_refused(sample: Any) -> None:
    out = sample.path / "sae"
    with pytest.raises(InputError) as raised:
        run(TrainConfig(cache=sample.path, out=out, **SETTINGS))
    assert str(raised.value) == (
        f"--out {out} lies in the activation store {sample.path}, which may hold no other files: "
        f"give a place outside it, such as {sample.path}-sae"
    )
    assert verify(sample.path).problems == []


@pytest.mark.parametrize("command", ["export", "import"])
def test_exports_and_imports_into_a_store_are_refused(
    command: str, sample: Any, tmp_path: Path
) -> None:
    made = run(TrainConfig(cache=sample.path, out=tmp_path / "sae", **SETTINGS)).directory
    source: list[object] = [made]
    if command == "import":
        done = CliRunner().invoke(main, ["export", str(made), str(tmp_path / "x"), "--to", "mlsae"])
        assert done.exit_code == 0, done.output
        source = [tmp_path / "x"]
    words = [command, *source, sample.path / "deep" / "sae"]
    words += ["--to", "mlsae"] if command == "export" else []
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == 1
    assert "deep/sae lies in the activation store" in done.output
    assert verify(sample.path).problems == []


def test_checkpoints_are_removed_and_nothing_else(tmp_path: Path) -> None:
    names = ["step-0000000001.json", "step-0000000001.safetensors", "step-0000000002.json"]
    for name in (*names, "notes.md", "step-best.safetensors"):
        (tmp_path / name).touch()
    Checkpoints(tmp_path, 1).prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.md",
        names[2],
        "step-best.safetensors",
    ]
    Checkpoints(tmp_path, 1).remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.md", "step-best.safetensors"]
