"""Real processes that write events: killed, stopped, several at once. The bytes are the same."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlsae.analyze import EventsConfig, load_events, run_events
from mlsae.base.errors import InputError
from mlsae.base.units import portion

PATIENCE_SECONDS = 120
NUM_PARTS = 111
"""A sequence each, at three layers, so that a kill falls among them."""

COMMAND = "import runpy; runpy.run_module('mlsae', run_name='__main__', alter_sys=True)"

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def alone(
    world: Any, sae_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> EventsConfig:
    """Events that one undisturbed process wrote."""
    config = EventsConfig(
        cache=world.store,
        sae=sae_maker(world.store),
        out=tmp_path_factory.mktemp("alone") / "events",
        rows="all",
        part_events=100,
        device="cpu",
    )
    run_events(config)
    return config


def at(config: EventsConfig, out: Path) -> EventsConfig:
    return EventsConfig(**vars(config) | {"out": out})


def command(config: EventsConfig) -> list[str]:
    """After the name of the program."""
    return [
        "events", "--cache", str(config.cache), "--sae", str(config.sae),
        "--out", str(config.out), "--rows", "all", "--part-events", "100", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def processes(forking: Any) -> Iterator[Any]:
    """Processes that have imported what writes events."""
    with forking.importing("mlsae.analyze.events.run") as processes:
        yield processes


@pytest.fixture
def start(processes: Any) -> Start:
    """The real command in another process."""

    def begin(config: EventsConfig, **environment: str) -> Any:
        return processes.start(COMMAND, *command(config), environment=environment)

    return begin


def num_recorded(out: Path) -> int:
    return len(list((out / "parts").rglob("*.json")))


def await_parts(out: Path, number: int, process: Any) -> None:
    """Until so many parts are recorded, or the process has ended before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while num_recorded(out) < number and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def assert_same(out: Path, alone: EventsConfig) -> None:
    """Every file, to the byte, and no other."""
    ours, theirs = (contents(path) for path in (out, alone.out))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert len(ours) == 2 * NUM_PARTS + 2


@pytest.mark.parametrize("num_kills", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_at_random_instants_it_ends_as_the_same_bytes(
    num_kills: int, alone: EventsConfig, start: Start, tmp_path: Path
) -> None:
    """Killed without warning, begun again, several times; a last run finishes."""
    generator, config = random.Random(0), at(alone, tmp_path / "events")
    for _ in range(num_kills):
        there = num_recorded(config.out)
        process = start(config)
        await_parts(config.out, there + generator.randint(1, 60 // num_kills), process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.errors
        assert there < num_recorded(config.out) < NUM_PARTS
        with pytest.raises(
            InputError, match=r"is unfinished: \d+ of 111 parts (is|are) there; run the"
        ):
            load_events(config.out)
    before = {file: file.stat().st_ino for file in config.out.rglob("*.parquet")}
    recorded = num_recorded(config.out)
    run_events(config)
    assert_same(config.out, alone)
    kept = sum(file.stat().st_ino == inode for file, inode in before.items())
    assert recorded <= kept


def test_two_ranks_of_torchrun_write_the_same_bytes(alone: EventsConfig, tmp_path: Path) -> None:
    """Each of them its half, in a world that is asserted to be of two."""
    config = at(alone, tmp_path / "events")
    script = str(Path(__file__).with_name("ranks_write.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", script, *command(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_same(config.out, alone)
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert said == ["rank 0 of 2 wrote 56 parts", "rank 1 of 2 wrote 55 parts"]
    assert sum(line.startswith("events ") for line in done.stdout.splitlines()) == 1


def test_what_a_killed_rank_leaves_is_written_by_a_rerun(
    alone: EventsConfig, start: Start, tmp_path: Path
) -> None:
    """Rank 0 waits and says for what, and what to do; stopped, it says what is safe."""
    config = at(alone, tmp_path / "events")
    second = start(config, RANK="1", WORLD_SIZE="2")
    first = start(config, RANK="0", WORLD_SIZE="2")
    own = config.out / "parts" / "layer-1" / "part-000000000024.json"
    deadline = time.monotonic() + PATIENCE_SECONDS
    # Index 4 of the parts, so of rank 0; rank 1 begins when rank 0 has.
    while not own.exists() and second.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    second.send_signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    while "waiting for " not in first.output and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert "parts of other ranks; if one of them has died, stop this and run the" in first.output
    first.send_signal(signal.SIGINT)
    assert first.wait() == 128 + signal.SIGINT
    there = num_recorded(config.out)
    assert first.errors.splitlines()[-1] == (
        f"stopped: {portion(there, 111, 'part')} safe in {config.out}; "
        "run the same command to go on"
    )
    assert 56 <= there < NUM_PARTS
    run_events(config)
    assert_same(config.out, alone)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_stopped_it_finishes_its_part_and_says_how_to_go_on(
    number: signal.Signals, alone: EventsConfig, start: Start, tmp_path: Path
) -> None:
    config = at(alone, tmp_path / "events")
    process = start(config)
    await_parts(config.out, 1, process)
    process.send_signal(number)
    status, errors = process.wait(), process.errors
    assert status == 128 + number, errors
    assert "finishing the part in hand, then stopping; press Ctrl-C again to stop" in errors
    there = num_recorded(config.out)
    assert 0 < there < NUM_PARTS
    assert errors.splitlines()[-1] == (
        f"stopped: {portion(there, 111, 'part')} safe in {config.out}; "
        "run the same command to go on"
    )
    assert len(list((config.out / "events").rglob("*.parquet"))) == there
    run_events(config)
    assert_same(config.out, alone)
