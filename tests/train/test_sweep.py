"""Several SAEs from one pass: each is what it would be alone, whatever becomes of the others."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed
from mlsae.sae import TopK, load
from mlsae.store import open_store
from mlsae.train import Sweep, TrainConfig, run, run_sweep
from mlsae.train.data.loader import Loader
from mlsae.train.pipeline import DivergedSAEsError
from mlsae.train.plan import make_plans
from mlsae.train.running import loop as passing_module
from mlsae.train.running.checkpoint import Checkpoints
from mlsae.train.running.memory import estimate
from mlsae.train.running.record import format_sweep
from mlsae.train.step.trainer import DivergedError, Trainer

SETTINGS: dict[str, Any] = {
    "num_latents": 40,
    "k": 4,
    "batch_size": 61,
    "lr": 3e-3,
    "validation_fraction": 0.1,
    "device": "cpu",
}


@pytest.fixture
def config(sample: Any, tmp_path: Path) -> Callable[..., TrainConfig]:
    """`config("name", k=5)`: settings of a run in a directory of the test's."""

    def make(name: str, **changes: Any) -> TrainConfig:
        return TrainConfig(cache=sample.path, out=tmp_path / name, **SETTINGS | changes)

    return make


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "sae.safetensors")


def assert_equal_saes(a: Path, b: Path) -> None:
    """Weights bit for bit, metrics, and the log but for its times."""
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name
    assert load(a).training_record["metrics"] == load(b).training_record["metrics"]
    assert log(a) == log(b)


def log(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [{**json.loads(line), "rows_per_second": 0} for line in lines]


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_a_member_equals_the_same_sae_alone(
    encoding: str, config: Any, sample: Any, encoded: Any
) -> None:
    """Bit for bit, with another seed and number of latents; rows and split are the first's."""
    cache = sample.path if encoding == "float16" else encoded(sample, encoding="int8")
    both = replace(config("sweep"), cache=cache)
    axes = {"num_latents": (40, 50), "seed": (5, 6)}
    results = run_sweep(Sweep(config=both, axes=axes))
    names = [result.directory.name for result in results]
    assert names == ["N40-seed5", "N40-seed6", "N50-seed5", "N50-seed6"]
    for name, settings in (
        ("N40-seed5", {"num_latents": 40, "seed": 5}),
        ("N50-seed6", {"num_latents": 50, "seed": 6, "data_seed": 5}),
    ):
        alone = replace(both, out=both.out.with_name(f"{name}-alone"), **settings)
        assert_equal_saes(run(alone).directory, both.out / name)
        settings = load(both.out / name).training_record["settings"]
        assert settings == load(alone.out).training_record["settings"]
        assert settings["data_seed"] == 5


def test_bytes_are_read_and_decoded_once(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One loader for all SAEs, its every batch decoded once."""
    counts = {"loaders": 0, "batches": 0, "decoded": 0}
    next_batch, begin, decode = Loader.__next__, Loader.__init__, passing_module.RowDecoder.__call__

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            counts[name] += 1
            return result

        return counted

    monkeypatch.setattr(Loader, "__init__", counting("loaders", begin))
    monkeypatch.setattr(Loader, "__next__", counting("batches", next_batch))
    monkeypatch.setattr(passing_module.RowDecoder, "__call__", counting("decoded", decode))
    results = run_sweep(
        Sweep(config=config("sweep", validation_fraction=0.0), axes={"k": (2, 3, 4)})
    )
    steps = log(results[0].directory)[-1]["step"]
    assert counts == {"loaders": 1, "batches": steps, "decoded": steps}


def test_a_mean_over_one_layer_is_shown_as_such_beside_a_mean_over_all() -> None:
    """A single-layer SAE's line names its layer; SAEs of the same layers need no such column."""
    entry = {"num_latents": 64, "k": 4, "lr": 1e-3, "fvu": 0.1, "fvu_pca": 0.2, "l0": 4.0,
             "dead_fraction": 0.0}  # fmt: skip
    whole = {**entry, "name": "all", "layers": [0, 1, 3]}
    lines = format_sweep([whole, {**entry, "name": "layer1", "layers": [1]}]).splitlines()
    assert lines[0].split()[:2] == ["SAE", "layers"]
    assert "  0–1, 3  " in lines[1]
    assert "  1  " in lines[2]
    assert lines[-1] == "compare SAEs of other layers layer by layer: fvu_by_layer in summary.json"
    alike = format_sweep([whole, {**whole, "name": "other"}]).splitlines()
    assert alike[0].split()[:2] == ["SAE", "latents"]
    assert alike[-1] == "validation rows, means over layers, position 0 out"


def test_each_layer_gets_an_sae_of_its_own_rows(config: Any) -> None:
    """A third of the rows each; it learns its layer, and its record says what it saw."""
    sweep = Sweep(config=config("sweep", epochs=2), each_layer=True)
    results = run_sweep(sweep)
    assert [result.directory.name for result in results] == ["all", "layer0", "layer1", "layer3"]
    whole = load(results[0].directory).training_record
    for result, layer in zip(results[1:], (0, 1, 3), strict=True):
        record = load(result.directory).training_record
        assert record["layers"] == [layer]
        assert record["settings"]["batch_layers"] == [0, 1, 3]
        assert 3 * record["position"]["rows"] == whole["position"]["rows"]
        assert 3 * record["position"]["epoch_rows"] == whole["position"]["epoch_rows"]
        assert log(result.directory)[-1]["rows"] == record["position"]["rows"]
        (entry,) = record["metrics"]["position_0_out"]["layers"]
        assert entry["layer"] == layer
        assert 0 < entry["fvu"] < 0.8
    assert_equal_saes(run(config("alone", epochs=2)).directory, results[0].directory)


def test_an_sae_of_a_layer_sees_the_rows_of_its_layer(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those and no others, of every batch."""
    batches: list[Any] = []
    step = Trainer.step

    def seen(self: Trainer, batch: Any) -> Any:
        batches.append(batch)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", seen)
    run_sweep(Sweep(config=config("sweep", max_rows=122), each_layer=True))
    for whole, *each in (batches[:4], batches[4:]):
        for index, batch in enumerate(each):
            assert torch.equal(batch.x, whole.x[whole.layer == index])
            assert batch.num_rows == len(batch.x) > 0
            assert not batch.layer.any()


def test_rows_of_a_layer_are_counted_without_seeing_them(config: Any, sample: Any) -> None:
    """Every batch is counted, the short last one of an epoch included."""
    sweep = Sweep(config=config("sweep", epochs=2), each_layer=True)
    plans = make_plans(sweep, open_store(sample.path))
    with Loader(plans[0].mixture, start=0, stop=plans[0].num_steps) as loader:
        for step, batch in enumerate(loader):
            assert plans[0].batch_rows(step) == len(batch.layer) == batch.num_rows
            for index, plan in enumerate(plans[1:]):
                assert plan.batch_rows(step) == int((batch.layer == index).sum())
                assert plan.rows_until(step + 1) == plan.rows_until(step) + plan.batch_rows(step)
    assert [plan.num_rows for plan in plans[1:]] == [plans[0].num_rows // 3] * 3


def test_a_short_last_batch_without_a_row_of_a_layer_is_no_step_of_its_sae(
    config: Any, sample: Any
) -> None:
    """The SAE goes on in the next epoch, and has seen each of its rows."""
    rows = make_plans(Sweep(config=config("none")), open_store(sample.path))[0].num_rows
    size = next(size for size in range(50, rows) if rows % size == 1)
    sweep = Sweep(config=config("sweep", epochs=2, batch_size=size), each_layer=True)
    results = run_sweep(sweep)
    steps = -(-rows // size)
    for result, skipped in zip(
        results, ([], [steps, 2 * steps], [steps, 2 * steps], []), strict=True
    ):
        lines = log(result.directory)
        there = [step for step in range(1, 2 * steps + 1) if step not in skipped]
        assert [line["step"] for line in lines] == there
        record = load(result.directory).training_record
        assert lines[-1]["rows"] == 2 * record["position"]["epoch_rows"]


def test_the_summary_is_a_table_and_a_file(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A line an SAE, in the order of the values; nothing is printed of one alone."""
    results = run_sweep(Sweep(config=config("sweep"), axes={"lr": (3e-3, 1e-4), "k": (2, 4)}))
    begin, *lines = capsys.readouterr().out.splitlines()
    assert begin.startswith("training 4 SAEs on 3 layers (0–1, 3) of resid_post")
    # In between stand the rest of the beginning, and a warning of documents on both sides.
    lines = lines[[line.split()[:1] for line in lines].index(["SAE"]) :]
    assert lines[0].split() == ["SAE", "latents", "k", "lr", "FVU", "PCA", "L0", "dead"]
    names = ["lr0.003-k2", "lr0.003-k4", "lr0.0001-k2", "lr0.0001-k4"]
    assert [line.split()[0] for line in lines[1:5]] == names
    assert lines[6] == f"SAEs: {config('sweep').out}"
    entries = read_sealed(config("sweep").out / "summary.json")["saes"]
    assert [entry["name"] for entry in entries] == names
    for entry, result in zip(entries, results, strict=True):
        assert result.metrics is not None
        by_layer = [layer["fvu"] for layer in result.metrics["position_0_out"]["layers"]]
        assert entry["fvu_by_layer"] == by_layer
        assert entry["fvu"] == pytest.approx(sum(by_layer) / 3)
    assert entries[1]["fvu"] < entries[0]["fvu"] < entries[2]["fvu"]


def test_one_value_is_no_sweep(config: Any) -> None:
    """The SAE's directory is that of the run."""
    (result,) = run_sweep(Sweep(config=config("run"), axes={"k": (3,)}))
    assert result.directory == config("run").out
    assert load(result.directory).architecture == TopK(3)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"k": (2, 2)}, "-k takes each value once, got 2, 2"),
        ({"lr": ()}, "--lr takes each value once, got none"),
        ({"batch_size": (8, 9)}, "SAEs of one run cannot differ in 'batch_size'; expected k, "),
    ],
)
def test_values_that_make_no_sweep_are_refused(axes: Any, message: str, config: Any) -> None:
    """One line."""
    with pytest.raises(InputError, match=message):
        Sweep(config=config("sweep"), axes=axes)


def test_values_that_are_nearly_equal_have_names_of_their_own(config: Any) -> None:
    """All digits where six do not tell them apart; else names stay as short as they were."""

    def names(**axes: Any) -> list[str]:
        return [sae.name for sae in Sweep(config=config("sweep"), axes=axes).saes((0,))]

    assert names(lr=(1e-4, 1.0000001e-4)) == ["lr0.0001", "lr0.00010000001"]
    assert names(lr=(1e-4 / 3, 3e-4)) == ["lr3.33333e-05", "lr0.0003"]
    assert names(k=(2, 3), l1_warmup=(0.1, 0.1 + 1e-9)) == [
        f"k{k}-l1-warmup-{share}" for k in (2, 3) for share in ("0.1", "0.100000001")
    ]


def test_an_sae_that_diverges_in_its_last_step_says_so(config: Any) -> None:
    """As at any other step, though no loss comes after; a lower rate elsewhere is a cure."""
    alone = config("run", lr=3e38, batch_size=10**4)
    message = (
        r"^the loss is nan at step 1 with learning rate 3e\+38, from layers 0, 1, 3: training "
    )
    message += "has diverged; train again into another --out with a lower --lr$"
    with pytest.raises(DivergedError, match=message):
        run(alone)
    assert not list(alone.out.glob("*.safetensors"))
    assert read_sealed(alone.out / "diverged.json")["step"] == 1
    with pytest.raises(DivergedError, match=message):
        run(replace(alone, resume=True))
    assert run(config("again", lr=1e-3, batch_size=10**4)).directory.exists()


def test_directories_of_other_runs_are_refused(config: Any) -> None:
    """One SAE is no sweep, a sweep is no SAE, and another sweep is not this one."""
    sweep = Sweep(config=config("sweep", max_rows=61), axes={"k": (2, 3)})
    run_sweep(sweep)
    with pytest.raises(InputError, match="holds several SAEs of a sweep, not one: choose another"):
        run(replace(sweep.config, resume=True))
    other = Sweep(config=replace(sweep.config, resume=True), axes={"k": (2, 4)})
    with pytest.raises(InputError, match=r"holds another run: axes \{'k': \[2, 3\]\} there, \{'k'"):
        run_sweep(other)
    with pytest.raises(InputError, match="holds this run already: add --resume"):
        run_sweep(sweep)
    run(config("one", max_rows=61))
    with pytest.raises(InputError, match="holds one SAE, not a sweep: choose another --out"):
        run_sweep(Sweep(config=config("one", resume=True), axes={"k": (2, 3)}))


class StopError(Exception):
    """Ends a run in the middle."""


@pytest.mark.parametrize("keep", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sweep_that_was_cut_short_anywhere_resumes_exactly(
    keep: int,
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Between two SAEs' checkpoints of one step, again in a step, again while SAEs are finished."""
    sweep = Sweep(config=config("sweep", keep=keep, max_rows=61 * 13), each_layer=True)
    whole = run_sweep(replace(sweep, config=replace(sweep.config, out=sweep.config.out / "../b")))
    often = replace(sweep, config=replace(sweep.config, checkpoint_seconds=0, resume=True))
    for target, method, times in (
        (Checkpoints, "save", 4 * 5 + 2),
        (Trainer, "step", 4 * 3 + 3),
        (Checkpoints, "prune", 4 * 2 + 3),
        (Checkpoints, "remove", 4 + 3),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, method, failing(getattr(target, method), times))
            with pytest.raises(StopError):
                run_sweep(often)
    results = run_sweep(often)
    said = [line for line in capsys.readouterr().out.splitlines() if "resuming" in line]
    assert said == [f"resuming after step {step} of 13" for step in (5, 8, 11, 12)]
    for result, other in zip(results, whole, strict=True):
        assert_equal_saes(result.directory, other.directory)
        assert {path.name for path in result.directory.iterdir()} == {
            path.name for path in other.directory.iterdir()
        }


def failing(original: Callable[..., Any], times: int) -> Callable[..., Any]:
    """Fails when it is called for the last of so many times."""
    left = times

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise StopError
        return original(*arguments, **options)

    return counted


def test_an_sae_that_diverges_leaves_the_others_alone(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are finished; the error names it, its step, layers and rate, and again when resumed."""
    sweep = Sweep(
        config=config("sweep", checkpoint_seconds=0, warmup=0.0), axes={"lr": (1e30, 3e-3)}
    )
    found = r"1 of 2 SAEs diverged, the others are finished: lr1e\+30: the loss is (nan|inf) "
    found += r"at step \d with learning rate 1e\+30, from layers? [013, ]+: training has diverged"
    with pytest.raises(DivergedSAEsError, match=found) as caught:
        run_sweep(sweep)
    out = sweep.config.out
    assert_equal_saes(run(config("alone", warmup=0.0)).directory, out / "lr0.003")
    kept = read_sealed(out / "lr1e+30/diverged.json")["step"]
    assert (out / f"lr1e+30/checkpoints/step-{kept:010d}.json").exists()
    entries = read_sealed(out / "summary.json")["saes"]
    assert entries[0]["diverged"] in str(caught.value)
    monkeypatch.setattr(Trainer, "step", failing(Trainer.step, 1))
    with pytest.raises(DivergedSAEsError, match=found):
        run_sweep(replace(sweep, config=replace(sweep.config, resume=True)))


def test_one_sae_that_diverges_stops_with_its_step_layer_and_rate(config: Any) -> None:
    """And keeps its last checkpoint."""
    alone = config("run", lr=1e30, checkpoint_seconds=0, warmup=0.0)
    message = (
        r"^the loss is (nan|inf) at step (\d) with learning rate 1e\+30, from layers? [013, ]+:"
    )
    with pytest.raises(DivergedError, match=message) as caught:
        run(alone)
    assert Checkpoints(alone.out / "checkpoints").steps()[-1] == caught.value.step
    assert not (alone.out / "config.json").exists()


def test_memory_is_that_of_all_saes(config: Any, sample: Any) -> None:
    """Memory that each SAE keeps adds up; the window and a step's memory are there once."""
    sweep = Sweep(config=config("sweep"), axes={"num_latents": (100, 300)})
    plans = make_plans(sweep, open_store(sample.path))
    both, *each = (estimate(of, 0, 1) for of in (plans, plans[:1], plans[1:]))
    for name in ("weights", "Adam and gradients"):
        assert both[name] == each[0][name] + each[1][name]
    for name in ("window", "activations", "AuxK"):
        assert both[name] == max(each[0][name], each[1][name])
    assert both["decoded rows"] >= 61 * 20 * 4
