"""Lines of the log arrive where they are sent besides, once each, also after a stop."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlsae.base.errors import InputError
from mlsae.train import Sweep, TrainConfig, run_sweep
from mlsae.train.running import tracking as module
from mlsae.train.running.tracking import check_tracker, scalars


def sweep(sample: Any, out: Path, **settings: Any) -> Sweep:
    config = TrainConfig(
        cache=sample.path,
        out=out,
        k=4,
        batch_size=61,
        validation_fraction=0.1,
        device="cpu",
        track="tensorboard",
        **settings,
    )
    return Sweep(config=config, axes={"num_latents": (40, 50)})


def sent(directory: Path) -> dict[int, dict[str, float]]:
    """Values that TensorBoard itself reads: step → name → value."""
    script = Path(__file__).with_name("read_tensorboard.py")
    done = subprocess.run(
        [sys.executable, str(script), str(directory)], capture_output=True, text=True, check=True
    )
    return {int(step): values for step, values in json.loads(done.stdout).items()}


def logged(directory: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return {line["step"]: scalars(line, (0, 1, 3)) for line in lines}


def assert_all_sent(directory: Path) -> None:
    found, wanted = sent(directory / "tensorboard"), logged(directory)
    assert found.keys() == wanted.keys()
    last = found[max(found)]
    by_layer = json.loads((directory / "training.json").read_text())["metrics"]["position_0_out"]
    for name in ("fvu", "fvu_standardized", "fvu_pca", "l0"):
        for entry in by_layer["layers"]:
            sent_value = last.pop(f"validation_{name}_by_layer/{entry['layer']}")
            assert math.isclose(sent_value, entry[name], rel_tol=1e-6)
    assert last.pop("validation_dead") == by_layer["num_dead"]
    for step, line in wanted.items():
        assert found[step].keys() == line.keys()
        for name, value in line.items():
            assert math.isclose(found[step][name], value, rel_tol=1e-6), (step, name)


def test_tensorboard_has_every_line_of_each_sae(sample: Any, tmp_path: Path) -> None:
    """Losses, FVU by layer and all, under the names of the log."""
    results = run_sweep(sweep(sample, tmp_path / "run"))
    assert [result.directory.name for result in results] == ["N40", "N50"]
    for result in results:
        assert_all_sent(result.directory)
        names = scalars(logged_line(result), (0, 1, 3)).keys()
        assert {f"fvu_by_layer/{layer}" for layer in (0, 1, 3)} <= names


def test_lines_that_come_again_take_the_place_of_those_before(tmp_path: Path) -> None:
    """As after a kill, when a run goes on from a checkpoint before its last lines."""
    for start, stop, value in [(0, 10, 1.0), (4, 12, 2.0)]:
        tracker = module.open_tracker("tensorboard", tmp_path, "run", {"layers": [3, 4]}, start)
        for step in range(start + 1, stop + 1):
            tracker.write({"step": step, "loss": value, "fvu_by_layer": [value, None]})
        tracker.close()
    found = sent(tmp_path / "tensorboard")
    values = {step: line["loss"] for step, line in found.items()}
    assert values == {step: 1.0 if step <= 4 else 2.0 for step in range(1, 13)}
    assert found[12] == {"loss": 2.0, "fvu_by_layer/3": 2.0}


def logged_line(result: Any) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((result.directory / "log.jsonl").read_text().splitlines()[-1])
    return line


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the line that pip understands."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        InputError, match=r"--track wandb needs wandb, .*: pip install 'mlsae\[wandb\]'"
    ):
        check_tracker("wandb")


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("online", "nobody is logged in here (No API key"),
        ("mad", "its settings cannot be read (1 validation error"),
        ("offline", ""),
    ],
)
def test_a_tracker_without_login_is_refused_before_anything_is_written(
    mode: str, message: str, tmp_path: Path
) -> None:
    """Unless the log stays here; wandb reads its settings once a process."""
    pytest.importorskip("wandb", reason="an extra that pulls in half a hundred packages")
    script = "from mlsae.train.running.tracking import check_tracker; check_tracker('wandb')"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=kept | {"HOME": str(tmp_path), "WANDB_MODE": mode},
        check=False,
    )
    assert (f"InputError: --track wandb: {message}" if message else "") in done.stderr
    assert (done.returncode == 0) == (message == "")


def test_another_tracker_is_refused(sample: Any, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(InputError, match="--track must be tensorboard or wandb, got 'neptune'"):
        TrainConfig(cache=sample.path, out=tmp_path / "run", track="neptune")
