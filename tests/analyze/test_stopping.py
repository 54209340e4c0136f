"""A stopped analysis keeps the steps that are done, and comes out the same when it goes on."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsae.analyze import AnalyzeConfig, pipeline, run
from mlsae.analyze.measure.model import cross_entropy
from mlsae.analyze.results.page import pictures
from mlsae.analyze.steps import Steps
from mlsae.base.directories import KEPT
from mlsae.base.interruption import InterruptedWorkError, Interruption

Make = Callable[[Path], AnalyzeConfig]


@pytest.fixture
def make(world: Any, sae_maker: Callable[..., Path]) -> Make:
    """Settings for an analysis without figures, two sequences at a time."""
    sae = sae_maker(world.store)

    def config(out: Path) -> AnalyzeConfig:
        return AnalyzeConfig(
            cache=world.store, sae=sae, out=out, figures=False, batch_size=48, examples=2
        )

    return config


def _content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def _stopped(
    patch: pytest.MonkeyPatch, module: Any, name: str, config: AnalyzeConfig, number: int
) -> InterruptedWorkError:
    """Run until the signal comes at the first progress of a function, or at its call."""
    original = getattr(module, name)

    def signalled(*arguments: Any, **options: Any) -> Any:
        report = options.get("progress")
        if report is None:
            signal.raise_signal(number)
            return original(*arguments, **options)

        def progress(count: int) -> None:
            report(count)
            if not sent:
                sent.append(count)
                signal.raise_signal(number)

        sent: list[int] = []
        return original(*arguments, **options | {"progress": progress})

    with patch.context() as context:
        context.setattr(module, name, signalled)
        with pytest.raises(InterruptedWorkError) as caught:
            run(config)
    assert caught.value.exit_status == 128 + number
    return caught.value


def test_a_stop_at_every_step_keeps_those_before(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No row is read again, and no token is scored again."""
    whole = run(make(tmp_path / "whole"))
    config = make(tmp_path / "out")
    line = _stopped(monkeypatch, pipeline, "walk", config, signal.SIGINT)
    assert str(line) == "stopped before anything was kept; run the same command to begin again"
    assert not config.out.exists()

    capfd.readouterr()
    line = _stopped(monkeypatch, cross_entropy, "measure", config, signal.SIGTERM)
    on = (
        f"stopped: sums over rows and tokens scored are kept in {config.out}; run the same command "
        f"to go on"
    )
    assert str(line) == on
    assert pipeline.STOPPING in capfd.readouterr().err
    (folder,) = config.out.iterdir()
    assert {path.name for path in (folder / KEPT).iterdir()} == {"rows.npz", "cross-entropy.npz"}

    scored: list[int] = []
    measure = cross_entropy.measure

    def counted(*arguments: Any, **options: Any) -> Any:
        return measure(*arguments, **options | {"progress": scored.append})

    monkeypatch.setattr(cross_entropy, "measure", counted)
    monkeypatch.setattr(pipeline, "walk", None)
    line = _stopped(monkeypatch, pipeline, "describe_decoder", config, signal.SIGINT)
    assert str(line) == on
    assert sum(scored) == (7 - 2) * 24
    assert "going on: the sums over rows are there\ngoing on: 48 tokens are scored\n" in (
        capfd.readouterr().out
    )

    line = _stopped(monkeypatch, pictures, "write_page", config, signal.SIGINT)
    assert str(line) == (
        f"stopped: the tables are whole in {config.out}; run the same command for the rest"
    )
    monkeypatch.setattr(cross_entropy, "measure", None)
    made = run(config)
    assert "the tables are whole" in capfd.readouterr().out
    assert _content(made.path) == _content(whole.path)


def test_other_settings_begin_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that are kept are those of the settings and inputs alone."""
    config = make(tmp_path / "out")
    _stopped(monkeypatch, pipeline, "describe_decoder", config, signal.SIGINT)
    run(AnalyzeConfig(**{**vars(config), "examples": 0, "samples": 0}))
    assert not [path for path in config.out.iterdir() if path.name.endswith(".partial")]


def test_a_damaged_step_is_done_again(tmp_path: Path) -> None:
    steps = Steps(tmp_path, Interruption())
    assert steps.read("rows") is None
    facts, arrays = {"a": [1, None, 0.1]}, {"b/c": np.arange(1000.0)}
    steps.keep("rows", facts, arrays)
    read = steps.read("rows")
    assert read is not None
    assert read[0] == facts
    np.testing.assert_array_equal(read[1]["b/c"], arrays["b/c"])
    file = tmp_path / KEPT / "rows.npz"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    for damaged in (bytes(data), bytes(data[:-100]), b""):
        file.write_bytes(damaged)
        assert steps.read("rows") is None
