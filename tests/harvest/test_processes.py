"""Real processes: one killed without warning, two on one store. The store is always the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from mlsae.base.units import portion
from mlsae.harvest import HarvestConfig, run
from mlsae.store import IncompleteStoreError, open_store
from mlsae.store.schema import commit_record

PATIENCE_SECONDS = 120
SCRIPT = """
import sys
from pathlib import Path
from mlsae.harvest import HarvestConfig, run
model, dataset, out, encoding = sys.argv[1:]
run(HarvestConfig(model=model, dataset=dataset, out=Path(out), context_length=16, batch_size=1,
                  device="cpu", shard_size=1_000, max_tokens=640, encoding=encoding))
"""

SmallShards = Callable[..., HarvestConfig]


@pytest.fixture
def small_shards(config: Callable[..., HarvestConfig]) -> SmallShards:
    """One sequence a shard: forty shards, so that a kill falls among them."""

    def make(out: Path, encoding: str = "auto") -> HarvestConfig:
        return config(out=out, batch_size=1, shard_size=1_000, max_tokens=640, encoding=encoding)

    return make


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Harvest in another process; none outlives its test."""
    with ExitStack() as processes:

        def begin(settings: HarvestConfig, **environment: str) -> "subprocess.Popen[bytes]":
            # Equal threads in every process, as bits need.
            threads = str(torch.get_num_threads())
            process = subprocess.Popen(
                [
                    *(sys.executable, "-c", SCRIPT, settings.model, str(settings.dataset)),
                    *(str(settings.out), settings.encoding),
                ],
                env={**os.environ, "OMP_NUM_THREADS": threads, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield begin


def await_commit(settings: HarvestConfig, shard: int, process: "subprocess.Popen[Any]") -> None:
    """Until a shard is committed, or the process has ended before."""
    record = settings.out / commit_record(shard)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not record.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def test_killed_harvest_continues_to_the_same_store(
    small_shards: SmallShards, start: Start, tmp_path: Path
) -> None:
    """In int8, whose plan rests on what the first batches held."""
    unbroken = run(small_shards(tmp_path / "unbroken", "int8"))
    assert unbroken is not None
    settings = small_shards(tmp_path / "killed", "int8")
    process = start(settings)
    await_commit(settings, 1, process)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    with pytest.raises(IncompleteStoreError, match=r"is incomplete: \d+ of \d+ shards"):
        open_store(settings.out)
    resumed = run(settings)
    assert resumed is not None
    assert resumed.store_id == unbroken.store_id
    assert 0 < resumed.bytes_written < unbroken.bytes_written


@pytest.mark.parametrize(
    ("world_size", "encoding"),
    [pytest.param(2, "int8-zstd", marks=pytest.mark.slow), (4, "int8")],
)
def test_ranks_make_the_store_that_one_makes(
    world_size: int,
    encoding: str,
    small_shards: SmallShards,
    start: Start,
    tmp_path: Path,
) -> None:
    """They meet in the directory alone; only rank 0 packs and prints."""
    alone = run(small_shards(tmp_path / "alone", encoding))
    assert alone is not None
    settings = small_shards(tmp_path / "shared", encoding)
    ranks = [
        start(settings, RANK=str(rank), WORLD_SIZE=str(world_size))
        for rank in reversed(range(world_size))
    ]
    outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world_size, outputs
    assert [output for output, _ in outputs[:-1]] == [b""] * (world_size - 1)
    assert b"packed" in outputs[-1][0]
    store = open_store(settings.out)
    assert store.store_id == alone.store_id
    assert store.provenance()[0]["world_size"] == world_size


def test_what_a_lost_rank_leaves_is_made_by_the_rerun(
    small_shards: SmallShards, start: Start, tmp_path: Path
) -> None:
    """Rank 1 never comes: rank 0 makes its own shards, waits, is stopped; one process finishes."""
    alone = run(small_shards(tmp_path / "alone"))
    assert alone is not None
    settings = small_shards(tmp_path / "lost")
    process = start(settings, RANK="0", WORLD_SIZE="2")
    assert process.stdout is not None
    seen = b""
    for line in process.stdout:
        seen += line
        if b"waiting for 20 shards of other ranks" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert b"stopped: 20 of 40 shards are safe in" in errors, (seen, errors)
    finished = run(settings)
    assert finished is not None
    assert finished.store_id == alone.store_id


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_harvest_finishes_its_shard_and_goes_on(
    number: signal.Signals,
    small_shards: SmallShards,
    tmp_path: Path,
) -> None:
    """The real command, stopped as a person or a scheduler does it."""
    settings = small_shards(tmp_path / "stopped")
    command = [
        sys.executable, "-m", "mlsae", "harvest", "--model", settings.model,
        "--dataset", str(settings.dataset), "--out", str(settings.out), "--context-length", "16",
        "--batch-size", "1", "--device", "cpu", "--shard-size", "1000", "--max-tokens", "640",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        await_commit(settings, 0, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 128 + number, errors
    assert "finishing the shard in hand, then stopping; press Ctrl-C again" in errors
    done = len(list((settings.out / "commits").glob("0*.json")))
    last = errors.splitlines()[-1]
    assert last == (
        f"stopped: {portion(done, 40, 'shard')} safe in {settings.out}; "
        "run the same command to go on"
    )
    assert 0 < done < 40
    alone = run(small_shards(tmp_path / "alone"))
    finished = run(settings)
    assert alone is not None
    assert finished is not None
    assert finished.store_id == alone.store_id


def test_rank_with_another_model_is_refused(
    config: Callable[..., HarvestConfig],
    model_maker: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlsae.store import PlanMismatchError

    run(config(max_tokens=100))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlanMismatchError, match="rank 1 runs another model than the plan at"):
        run(config(max_tokens=100, model=str(model_maker(scale=2.0))))


def test_rank_with_another_attention_is_refused(
    config: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the option to start every rank with."""
    from mlsae.store import PlanMismatchError

    run(config(max_tokens=100, attention_implementation="eager"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlanMismatchError, match="with --attn-implementation eager"):
        run(config(max_tokens=100))
