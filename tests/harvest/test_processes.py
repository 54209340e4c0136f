"""Real processes: one killed without warning, two on one store. The store is always the same."""

import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mlsae.base.units import portion
from mlsae.harvest import HarvestConfig, HarvestResult, run
from mlsae.store import IncompleteStoreError, open_store
from mlsae.store.schema import commit_record

PATIENCE_SECONDS = 120
SCRIPT = """
import sys
from pathlib import Path
from mlsae.harvest import HarvestConfig, HarvestResult, run
model, dataset, out, encoding = sys.argv[1:]
run(HarvestConfig(model=model, dataset=dataset, out=Path(out), context_length=16, batch_size=1,
                  device="cpu", shard_size=1_000, max_tokens=640, encoding=encoding))
"""
COMMAND = "import runpy; runpy.run_module('mlsae', run_name='__main__', alter_sys=True)"

SmallShards = Callable[..., HarvestConfig]
Unbroken = Callable[[str], HarvestResult]


@pytest.fixture(scope="module")
def small_shards(model: Path, dataset: Path) -> SmallShards:
    """One sequence a shard: forty shards, so that a kill falls among them."""

    def make(out: Path, encoding: str = "auto") -> HarvestConfig:
        return HarvestConfig(
            model=str(model), dataset=str(dataset), out=out, context_length=16, batch_size=1,
            device="cpu", shard_size=1_000, max_tokens=640, encoding=encoding,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def unbroken(small_shards: SmallShards, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Harvest by one process, by encoding."""

    @cache
    def make(encoding: str) -> HarvestResult:
        result = run(small_shards(tmp_path_factory.mktemp("unbroken") / "acts", encoding))
        assert result is not None
        return result

    return make


Start = Callable[..., Any]


@pytest.fixture(scope="module")
def processes(forking: Any) -> Iterator[Any]:
    """Processes that have imported what harvests; as many threads as here, as bits need."""
    modules = ("mlsae.harvest.pipeline", "transformers.models.gpt_neox.modeling_gpt_neox")
    threads = str(torch.get_num_threads())
    with forking.importing(*modules, environment={"OMP_NUM_THREADS": threads}) as processes:
        yield processes


@pytest.fixture
def start(processes: Any) -> Start:
    """Harvest in another process."""

    def begin(settings: HarvestConfig, **environment: str) -> Any:
        words = (settings.model, settings.dataset, settings.out, settings.encoding)
        return processes.start(SCRIPT, *words, environment=environment)

    return begin


def wait_until(is_so: Callable[[], bool], process: Any) -> None:
    """Until something is so, or the process has ended before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def await_commit(settings: HarvestConfig, shard: int, process: Any) -> None:
    """Until a shard is committed, or the process has ended before."""
    wait_until((settings.out / commit_record(shard)).exists, process)


def test_killed_harvest_continues_to_the_same_store(
    small_shards: SmallShards, start: Start, unbroken: Unbroken, tmp_path: Path
) -> None:
    """In int8, whose plan rests on what the first batches held."""
    whole = unbroken("int8")
    settings = small_shards(tmp_path / "killed", "int8")
    process = start(settings)
    await_commit(settings, 1, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.errors
    with pytest.raises(IncompleteStoreError, match=r"is incomplete: \d+ of \d+ shards"):
        open_store(settings.out)
    resumed = run(settings)
    assert resumed is not None
    assert resumed.store_id == whole.store_id
    assert 0 < resumed.bytes_written < whole.bytes_written


@pytest.mark.parametrize(
    ("world_size", "encoding"),
    [pytest.param(2, "int8-zstd", marks=pytest.mark.slow), (4, "int8")],
)
def test_ranks_make_the_store_that_one_makes(
    world_size: int,
    encoding: str,
    small_shards: SmallShards,
    start: Start,
    unbroken: Unbroken,
    tmp_path: Path,
) -> None:
    """They meet in the directory alone; only rank 0 packs, and others say that they wait for it."""
    settings = small_shards(tmp_path / "shared", encoding)
    ranks = [
        start(settings, RANK=str(rank), WORLD_SIZE=str(world_size))
        for rank in reversed(range(world_size))
    ]
    statuses = [process.wait() for process in ranks]
    assert statuses == [0] * world_size, [process.errors for process in ranks]
    told = [line for process in ranks[:-1] for line in process.output.splitlines()]
    assert [line for line in told if " waits for rank 0 to make the plan at " not in line] == []
    assert "packed" in ranks[-1].output
    store = open_store(settings.out)
    assert store.store_id == unbroken(encoding).store_id
    assert store.provenance()[0]["world_size"] == world_size


def test_what_a_lost_rank_leaves_is_made_by_the_rerun(
    small_shards: SmallShards, start: Start, unbroken: Unbroken, tmp_path: Path
) -> None:
    """Rank 1 never comes: rank 0 makes its own shards, waits, is stopped; one process finishes."""
    settings = small_shards(tmp_path / "lost")
    process = start(settings, RANK="0", WORLD_SIZE="2")
    wait_until(lambda: "waiting for 20 shards of other ranks" in process.output, process)
    process.send_signal(signal.SIGINT)
    process.wait()
    assert "stopped: 20 of 40 shards are safe in" in process.errors, process.output
    finished = run(settings)
    assert finished is not None
    assert finished.store_id == unbroken(settings.encoding).store_id


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_harvest_finishes_its_shard_and_goes_on(
    number: signal.Signals,
    small_shards: SmallShards,
    processes: Any,
    unbroken: Unbroken,
    tmp_path: Path,
) -> None:
    """The real command, stopped as a person or a scheduler does it."""
    settings = small_shards(tmp_path / "stopped")
    process = processes.start(
        COMMAND, "harvest", "--model", settings.model, "--dataset", settings.dataset,
        "--out", settings.out, "--context-length", "16", "--batch-size", "1", "--device", "cpu",
        "--shard-size", "1000", "--max-tokens", "640",
    )  # fmt: skip
    await_commit(settings, 0, process)
    process.send_signal(number)
    status, errors = process.wait(), process.errors
    assert status == 128 + number, errors
    assert "finishing the shard in hand, then stopping; press Ctrl-C again" in errors
    done = len(list((settings.out / "commits").glob("0*.json")))
    last = errors.splitlines()[-1]
    assert last == (
        f"stopped: {portion(done, 40, 'shard')} safe in {settings.out}; "
        "run the same command to go on"
    )
    assert 0 < done < 40
    finished = run(settings)
    assert finished is not None
    assert finished.store_id == unbroken(settings.encoding).store_id


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
