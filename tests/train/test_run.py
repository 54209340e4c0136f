"""Whole runs: what they leave behind, resume from, refuse, and never import."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed
from mlsae.sae import load
from mlsae.store import open_store
from mlsae.store.read.split import validation_of
from mlsae.train import Sweep, TrainConfig, run, run_sweep
from mlsae.train.pipeline import UselessSAEsError
from mlsae.train.running.checkpoint import DamagedCheckpointError
from mlsae.train.step.trainer import Trainer

SETTINGS: dict[str, Any] = {
    "num_latents": 64,
    "k": 4,
    "batch_size": 60,
    "epochs": 2,
    "lr": 3e-3,
    "validation_fraction": 0.1,
    "device": "cpu",
}


def config(sample: Any, out: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(cache=sample.path, out=out, **SETTINGS | changes)


@pytest.fixture(scope="module")
def finished_once(
    copied_sample: Any, drawing_curves: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    settings = config(copied_sample(directory / "acts"), directory / "finished")
    with drawing_curves():
        return run(settings).directory


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A run of `sample`'s values that has ended."""
    shutil.copytree(finished_once, tmp_path / "finished")
    return tmp_path / "finished"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "sae.safetensors")


def assert_equal_runs(a: Path, b: Path) -> None:
    """Weights bit for bit, metrics, and the log but for its times."""
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name
    assert load(a).training_record["metrics"] == load(b).training_record["metrics"]
    logs = [
        [
            {**json.loads(line), "rows_per_second": 0}
            for line in (directory / "log.jsonl").read_text().splitlines()
        ]
        for directory in (a, b)
    ]
    assert logs[0] == logs[1]


def test_a_run_leaves_an_sae_its_record_a_log_and_curves(finished: Path, sample: Any) -> None:
    """And nothing else: checkpoints are gone."""
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "sae.safetensors",
        "config.json",
        "training.json",
        "run.json",
        "run.yaml",
        "log.jsonl",
        "curves.png",
    }
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    sae, store = load(finished), open_store(sample.path)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    record = sae.training_record
    assert record["store_id"] == store.store_id
    assert record["plan_id"] == store.plan_id
    assert record["model_fingerprint"] is None
    assert record["site"] == "resid_post"
    assert record["layers"] == [0, 1, 3]
    assert record["skip_positions"] == 1
    assert record["settings"]["lr"] == 3e-3
    assert record["stores"] == [
        {
            "store_id": store.store_id,
            "plan_id": store.plan_id,
            "tokens_sha256": store.plan.tokens_sha256,
            "num_sequences": 37,
        }
    ]
    split = record["validation"]
    held_out = validation_of(store, split["fraction"], split["seed"])
    assert split["num_held_out"] == len(held_out) == 4
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, record["position"]["step"] + 1))
    assert lines[-1]["rows"] == record["position"]["rows"] == 2 * record["position"]["epoch_rows"]


def test_training_learns(finished: Path) -> None:
    """FVU on held-out rows falls well below 1, the last log line below the first."""
    record = load(finished).training_record
    for entry in record["metrics"]["position_0_out"]["layers"]:
        assert 0 < entry["fvu"] < 0.8
        assert entry["l0"] <= 4
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < 0.85 * lines[0]["fvu"]


def test_equal_settings_give_equal_runs(finished: Path, sample: Any, tmp_path: Path) -> None:
    """Bit for bit, in one process after another."""
    assert_equal_runs(finished, run(config(sample, tmp_path / "again")).directory)


@pytest.mark.parametrize("loss_space", ["standardized", "raw"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_loss_space_and_precision_trains(
    loss_space: str, precision: str, sample: Any, tmp_path: Path
) -> None:
    """Both spaces, both precisions, a subset of layers; the settings are on record."""
    result = run(
        config(sample, tmp_path / "run", loss_space=loss_space, precision=precision, layers=(0, 3))
    )
    assert result.metrics is not None
    assert [entry["layer"] for entry in result.metrics["position_0_in"]["layers"]] == [0, 3]
    assert all(entry["fvu"] < 0.9 for entry in result.metrics["position_0_out"]["layers"])
    assert load(result.directory).training_record["settings"]["precision"] == precision


def test_the_summary_is_printed_by_layer(
    sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines about the run first, then one a layer, PCA beside, the dead latents, and the path."""
    run(config(sample, tmp_path / "run"))
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0].startswith("training ")
    assert lines[0].endswith(" on 3 layers (0–1, 3) of resid_post, 20 channels, on cpu")
    assert " steps of " in lines[1]
    assert lines[2] == f"log: {tmp_path / 'run' / 'log.jsonl'}"
    assert lines[3].endswith(" are in documents that are trained on in part")
    assert " ".join(lines[4].split()) == "layer FVU PCA FVU of u L0 FVU with position 0"
    assert [line.split()[0] for line in lines[5:8]] == ["0", "1", "3"]
    entries = read_sealed(tmp_path / "run" / "training.json")["metrics"]["position_0_out"]["layers"]
    assert [line.split()[2] for line in lines[5:8]] == [f"{e['fvu_pca']:.4f}" for e in entries]
    assert lines[8].startswith("PCA: FVU of the 4 leading directions of each layer")
    assert lines[9].startswith("dead: ")
    assert lines[9].endswith(" validation rows")
    assert lines[10] == "rows without a latent: none"
    assert lines[11] == f"SAE: {tmp_path / 'run'}"
    assert "steps may be too few: give more --epochs, a smaller --batch-size" in told.err


def test_an_sae_that_pca_beats_is_told(
    sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the layers; the run is finished all the same."""
    run(config(sample, tmp_path / "run", num_latents=4, lr=1e-9, epochs=1))
    warning = capsys.readouterr().err.splitlines()[-1]
    assert warning == (
        f"warning: {tmp_path / 'run'}: no better than PCA at layers 0–1, 3: give more --epochs, "
        f"more latents (-R) or another --lr"
    )


@pytest.mark.usefixtures("curves")
def test_an_sae_that_the_mean_beats_is_an_error_and_kept(sample: Any, tmp_path: Path) -> None:
    """Whoever starts runs one after the other sees it in the exit status."""
    with pytest.raises(UselessSAEsError, match=r"run: finished and kept, but no better than"):
        run(config(sample, tmp_path / "run", lr=30.0, epochs=1))
    assert (tmp_path / "run" / "sae.safetensors").exists()
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.usefixtures("curves")
def test_curves_follow_no_settings_of_the_user(sample: Any, tmp_path: Path) -> None:
    """A matplotlibrc may ask for LaTeX, which is not installed, or for a font that is not there."""
    with matplotlib.rc_context({"text.usetex": True, "font.family": "no such font"}):
        run(config(sample, tmp_path / "run", epochs=1))
    assert (tmp_path / "run" / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.usefixtures("curves")
def test_curves_that_cannot_be_drawn_cost_nothing_else(
    finished: Path, sample: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """They come last, and are drawn on --resume where they are missing; an error is a warning."""
    curves, log = finished / "curves.png", finished / "log.jsonl"
    drawn = curves.read_bytes()
    curves.unlink()
    run(config(sample, finished, resume=True))
    assert curves.read_bytes() == drawn
    curves.unlink()
    log.write_bytes(b"")
    result = run(config(sample, finished, resume=True))
    assert result.metrics is not None
    warning = capsys.readouterr().err.splitlines()[-2]
    assert warning.startswith(f"warning: {curves} could not be made (")
    assert warning.endswith("); all else is whole")


def test_no_validation_is_no_summary(sample: Any, tmp_path: Path) -> None:
    """A fraction of 0 trains on everything and says that there is nothing to summarise."""
    result = run(
        config(sample, tmp_path / "run", validation_fraction=0.0, max_rows=60, epochs=None)
    )
    assert result.metrics is None


class StopError(Exception):
    """Ends a run in the middle."""


def run_until(step: int, monkeypatch: pytest.MonkeyPatch, settings: TrainConfig) -> None:
    """Run, but fail in the given step as a crash would."""
    original = Trainer.step

    def failing(self: Trainer, batch: Any) -> Any:
        if self.step_number == step:
            raise StopError
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        with pytest.raises(StopError):
            run(settings)


@pytest.mark.parametrize("step", [1, 20, 41, 42, 70])
def test_a_resumed_run_equals_an_unbroken_one(
    step: int, finished: Path, sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, within an epoch, at its end, and stopped twice."""
    out = tmp_path / "run"
    run_until(step, monkeypatch, config(sample, out, checkpoint_seconds=0))
    assert not (out / "config.json").exists()
    assert len(list((out / "checkpoints").iterdir())) <= 4
    again = config(sample, out, checkpoint_seconds=0, resume=True)
    run_until(step + 3, monkeypatch, again)
    run(again)
    assert_equal_runs(finished, out)


def test_a_run_without_checkpoint_resumes_from_the_start(
    finished: Path, sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before its first checkpoint, or resumed although it never began."""
    out = tmp_path / "run"
    run_until(5, monkeypatch, config(sample, out))
    run(config(sample, out, resume=True))
    assert_equal_runs(finished, out)
    run(config(sample, tmp_path / "never", resume=True))
    assert_equal_runs(finished, tmp_path / "never")


def test_a_damaged_checkpoint_is_refused_by_name(
    sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line says what to delete, and which checkpoint is tried then."""
    out = tmp_path / "run"
    run_until(10, monkeypatch, config(sample, out, checkpoint_seconds=0))
    path = out / "checkpoints" / "step-0000000010.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    again = config(sample, out, resume=True)
    with pytest.raises(
        DamagedCheckpointError,
        match=r"step-0000000010\.safetensors is damaged: .* step-0000000009,",
    ):
        run(again)
    path.unlink()
    path.with_suffix(".json").unlink()
    run(again)


def test_a_finished_run_is_left_alone(
    finished: Path, sample: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """--resume says so and returns its result."""
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    result = run(config(sample, finished, resume=True))
    assert capsys.readouterr().out == f"{finished} is finished already\n"
    assert result.metrics == load(finished).training_record["metrics"]
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def test_the_directory_of_another_run_is_refused(finished: Path, sample: Any) -> None:
    """Every setting that differs is named with both values; an equal run needs --resume."""
    with pytest.raises(InputError, match=r"holds this run already: add --resume to continue it"):
        run(config(sample, finished))
    with pytest.raises(
        InputError, match=r"holds another run: k 4 there, 5 here; lr 0\.003 there, 0\.01 here\."
    ):
        run(config(sample, finished, k=5, lr=0.01, resume=True))


def test_a_directory_with_other_files_is_refused(sample: Any, tmp_path: Path) -> None:
    """One of them is named, and nothing is added."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(InputError, match=r"holds other files \(notes\.txt\) and no training run"):
        run(config(sample, tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_damage_in_the_store_stops_the_run_and_leaves_no_sae(sample: Any, tmp_path: Path) -> None:
    """Found by the reading thread, told by the run; after repair it resumes."""
    path = sample.path / "activations/resid_post/1/c.1.0"
    shutil.copy(path, tmp_path / "copy")
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="checksum"):
        run(config(sample, tmp_path / "run"))
    assert not (tmp_path / "run/config.json").exists()
    shutil.copy(tmp_path / "copy", path)
    assert run(config(sample, tmp_path / "run", resume=True)).metrics


def command(cache: Path, out: Path) -> list[str]:
    flags = {**SETTINGS, "cache": cache, "out": out}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return ["-m", "mlsae", "train", *words]


@pytest.fixture(scope="module")
def processes(forking: Any) -> Iterator[Any]:
    """Processes that have imported what trains, without a warning for its users."""
    strict = {"PYTHONWARNINGS": "error::UserWarning"}
    modules = ("mlsae.train.pipeline", "matplotlib.figure", "matplotlib.style")
    with forking.importing(*modules, environment=strict) as processes:
        yield processes


def test_a_killed_process_resumes_to_the_same_weights(
    sample: Any, tmp_path: Path, processes: Any
) -> None:
    """SIGKILL as soon as there are two checkpoints; the same command with --resume finishes."""
    code = (
        "import sys; from pathlib import Path; from mlsae.train import TrainConfig, run;"
        "run(TrainConfig(cache=Path(sys.argv[1]), out=Path(sys.argv[2]), resume=True,"
        f"checkpoint_seconds=float(sys.argv[3]), **{SETTINGS | {'epochs': 8}!r}))"
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = processes.start(code, sample.path, killed, 0)
    while process.poll() is None and len(list(killed.glob("checkpoints/*.json"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9
    assert not (killed / "config.json").exists()
    for out in (killed, whole):
        process = processes.start(code, sample.path, out, 300)
        assert process.wait() == 0, process.errors
    assert_equal_runs(killed, whole)


FOUR = pytest.param(4, marks=pytest.mark.slow)


def launch(*words: str, ranks: int = 2) -> str:
    """Start processes as a user would, and give what they print."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = (*torchrun, "--nproc-per-node", str(ranks), *words)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_losses_and_gradients_of_ranks_are_those_of_one(ranks: int, processes: Any) -> None:
    """To 1e-9 in float64 over 50 steps, with dead latents, unequal and empty shares."""
    code = Path(__file__).with_name("ranks_agree.py").read_text()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    ranked = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    started = [processes.start(code, environment=environment) for environment in ranked]
    assert [process.wait() for process in started] == [0] * ranks, [p.errors for p in started]
    assert [process.output for process in started] == ["ranks agree\n"] + [""] * (ranks - 1)


@pytest.mark.parametrize("ranks", [2, FOUR])
def test_ranks_train_as_one_does(
    ranks: int, sample: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun really starts them; losses, dead counts, final weights and metrics agree."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    printed = launch(*command(sample.path, tmp_path / "two"), ranks=ranks)
    assert printed.count("SAE: ") == 1
    two, one = load(tmp_path / "two"), load(finished)
    assert two.training_record["environment"]["world_size"] == ranks
    assert one.training_record["environment"]["world_size"] == 1
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)
    logs = [
        [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        for directory in (finished, tmp_path / "two")
    ]
    for a, b in zip(*logs, strict=True):
        assert (a["step"], a["rows"]) == (b["step"], b["rows"])
        np.testing.assert_allclose(b["fvu_by_layer"], a["fvu_by_layer"], rtol=1e-3)
        assert a["num_dead"] == b["num_dead"]
    np.testing.assert_allclose(logs[1][4]["loss"], logs[0][4]["loss"], rtol=1e-6)
    np.testing.assert_allclose(logs[1][49]["loss"], logs[0][49]["loss"], rtol=1e-3)
    for a, b in zip(
        one.training_record["metrics"]["position_0_out"]["layers"],
        two.training_record["metrics"]["position_0_out"]["layers"],
        strict=True,
    ):
        assert a["num_rows"] == b["num_rows"]
        np.testing.assert_allclose(a["fvu"], b["fvu"], rtol=1e-3)


@pytest.mark.slow
def test_ranks_with_saes_of_their_own_give_what_one_process_gives(
    sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: each SAE has whole batches; a third one makes the shares unequal."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [*command(sample.path, tmp_path / "two"), "-k", "3,5", "--distribute", "saes"]
    printed = launch(*words)
    assert printed.count("SAEs: ") == 1
    sweep = Sweep(config=config(sample, tmp_path / "one"), axes={"k": (4, 3, 5)})
    for result in run_sweep(sweep):
        other = tmp_path / "two" / result.directory.name
        assert_equal_runs(result.directory, other)
        assert load(other).training_record["environment"]["world_size"] == 2
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.mark.slow
def test_more_ranks_than_saes_to_distribute_are_refused(
    sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is made."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(AssertionError, match="2 ranks cannot share 1 SAE: start at most 1, or gi"):
        launch(*command(sample.path, tmp_path / "two"), "--distribute", "saes")
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_a_store_of_kept_positions_trains_resumes_and_is_shared_by_ranks(
    sample: Any, thinned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any other; the sequences held out are those of the full store."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = thinned(sample, num=9)
    settings = {"cache": store, "checkpoint_seconds": 0}
    whole = run(replace(config(sample, tmp_path / "whole"), **settings)).directory
    broken = replace(config(sample, tmp_path / "broken"), **settings)
    run_until(7, monkeypatch, broken)
    run(replace(broken, resume=True))
    assert_equal_runs(whole, tmp_path / "broken")
    record = load(whole).training_record
    held_out = validation_of(open_store(sample.path), 0.1, 0)
    eligible = open_store(store).eligible(1)
    sequence = np.arange(37 * 9) // 9
    num_held_out = 3 * int(eligible[np.isin(sequence, held_out)].sum())
    assert record["metrics"]["position_0_out"]["num_rows"] == num_held_out > 0
    assert record["position"]["epoch_rows"] == 3 * int(eligible.sum()) - num_held_out
    launch(*command(store, tmp_path / "two"))
    two = load(tmp_path / "two")
    for name, tensor in load(whole).state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)


def test_training_never_imports_transformers(sample: Any, tmp_path: Path, processes: Any) -> None:
    """Nor datasets, by a whole run in a process that has imported what trains and no more."""
    code = (
        "import sys; from pathlib import Path; from mlsae.train import TrainConfig, run;"
        "run(TrainConfig(cache=Path(sys.argv[1]), out=Path(sys.argv[2]), num_latents=64, k=4,"
        "batch_size=60, device='cpu', validation_fraction=0.1));"
        "sys.exit(', '.join({'transformers', 'datasets'} & set(sys.modules)) or None)"
    )
    process = processes.start(code, sample.path, tmp_path / "run")
    assert process.wait() == 0, process.errors
    assert (tmp_path / "run/config.json").exists()
