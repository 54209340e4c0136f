"""Several processes on one store, some of them killed."""

import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlsae.store import open_store
from mlsae.store.tools.verify import verify

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
    "-m", "mlsae",
)  # fmt: skip


def commits(path: Path) -> int:
    """Shards that are committed."""
    return len(list((path / "commits").glob("[0-9]*.json")))


def await_state(process: Any, reached: Callable[[], bool]) -> bool:
    """Until something is there, or the process has ended; whether it still runs."""
    while not reached() and process.poll() is None:
        time.sleep(0.001)
    return bool(process.poll() is None)


def rank_of(launcher: Any, rank: int) -> psutil.Process | None:
    """The process that torchrun made a rank."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            if process.environ().get("RANK") == str(rank):
                return process
        except psutil.Error:  # The process is just beginning, or has ended.
            continue
    return None


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the plan": lambda _: True,
    "setup": lambda path: (path / "plan.json").exists(),
    "among shards": lambda path: commits(path) >= 5,
    "near the end": lambda path: commits(path) >= 14,
}


def test_of_two_ranks_one_is_killed(kit: Any, counts: Any, store_id: str, tmp_path: Path) -> None:
    """torchrun stops the other, which says what is safe; then the same command finishes, or one
    process alone does.
    """
    killed: Counter[str] = Counter()
    for number, (moment, rank) in enumerate(zip(MOMENTS, (0, 1, 0, 1), strict=True)):
        path = tmp_path / f"acts{number}"
        harvest = kit.Harvest(path, command=TORCHRUN)
        launcher = harvest.start()
        assert await_state(launcher, lambda: rank_of(launcher, rank) is not None)  # noqa: B023
        await_state(launcher, lambda: MOMENTS[moment](path))  # noqa: B023
        victim = rank_of(launcher, rank)
        if victim is not None:
            victim.send_signal(signal.SIGKILL)
        _, errors = launcher.communicate(timeout=kit.PATIENCE_SECONDS)
        if launcher.returncode != 0:
            killed[moment] += 1
            assert "mlsae/" not in errors.split("torch/distributed")[0], errors
        # Killed or not, complete or visibly incomplete.
        kit.state_of(path)
        again = (harvest if rank == 0 else kit.Harvest(path)).run()
        assert again.returncode == 0, again.stderr
        kit.assert_sound(path, store_id)
        shutil.rmtree(path)
    assert sum(killed.values()) >= len(MOMENTS) - 1
    counts.add("ranks", kills=sum(killed.values()))


def test_without_a_launcher_the_other_rank_waits(
    kit: Any, counts: Any, store_id: str, tmp_path: Path
) -> None:
    """A line says for which rank; begun again by itself, the killed rank lets both finish."""
    path = tmp_path / "acts"

    def rank(number: int) -> Any:
        environment = {"RANK": str(number), "WORLD_SIZE": "2"}
        return kit.Harvest(path, environment=environment).start()

    first, second = rank(0), rank(1)
    await_state(second, lambda: commits(path) >= 4)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    for line in first.stdout:
        if line.startswith("waiting for "):
            assert "if one of them has died, stop this and run the same command again" in line
            break
    third = rank(1)
    outputs = [process.communicate(timeout=kit.PATIENCE_SECONDS) for process in (first, third)]
    assert [first.returncode, third.returncode] == [0, 0], outputs
    kit.assert_sound(path, store_id)
    counts.add("ranks", kills=1)


@pytest.mark.parametrize("delay", [0.0, 0.3, 2.0])
def test_two_harvests_of_one_plan_both_finish(
    kit: Any, counts: Any, store_id: str, delay: float, tmp_path: Path
) -> None:
    """Begun at the same instant, or one while the other is at work."""
    path = tmp_path / "acts"
    first = kit.Harvest(path).start()
    time.sleep(delay)
    second = kit.Harvest(path).start()
    outputs = [process.communicate(timeout=kit.PATIENCE_SECONDS) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    kit.assert_sound(path, store_id)
    counts.add("together", one_plan=1)


@pytest.mark.parametrize("seed", range(3))
def test_of_two_harvests_one_is_killed(
    kit: Any, counts: Any, store_id: str, seed: int, tmp_path: Path
) -> None:
    """The other finishes, and takes away what the killed one left behind."""
    path, generator = tmp_path / "acts", random.Random(seed)
    both = [kit.Harvest(path).start() for _ in range(2)]
    wanted = generator.randrange(1, 12)
    await_state(both[0], lambda: commits(path) >= wanted)
    victim = both.pop(generator.randrange(2))
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    _, errors = both[0].communicate(timeout=kit.PATIENCE_SECONDS)
    assert both[0].returncode == 0, errors
    kit.assert_sound(path, store_id)
    counts.add("together", one_killed=1)


def test_another_plan_is_refused_and_harms_nothing(
    kit: Any, counts: Any, store_id: str, tmp_path: Path
) -> None:
    """While the first is at work and after it; through every difference there is a word for."""
    path = tmp_path / "acts"
    first = kit.Harvest(path).start()
    await_state(first, (path / "commits/00000.json").exists)
    others = {
        "layers": ("--layers", "0,1"),
        "encoding": ("--encoding", "float32"),
        "keep_positions": ("--keep-positions", "8"),
        "context_length": ("--context-length", "32"),
        "num_tokens": ("--max-tokens", "4096"),
    }

    def refuse(key: str) -> None:
        done = kit.Harvest(path, options=others[key]).run()
        line = kit.assert_refused(done, f"{path} holds a store of another plan")
        assert key in line

    kit.side_by_side(refuse, list(others))
    _, errors = first.communicate(timeout=kit.PATIENCE_SECONDS)
    assert first.returncode == 0, errors
    refuse("layers")
    kit.assert_sound(path, store_id)
    counts.add("together", other_plan=len(others) + 1)


def test_two_plans_at_the_same_instant(kit: Any, counts: Any, tmp_path: Path) -> None:
    """One of them is refused, or finds itself refused before it has written anything."""
    path = tmp_path / "acts"
    both = [kit.Harvest(path, options=("--layers", layers)).start() for layers in ("0", "1")]
    errors = [process.communicate(timeout=kit.PATIENCE_SECONDS)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], errors
    refused = errors[[process.returncode for process in both].index(1)]
    assert "holds a store of another plan (layers: " in refused
    assert verify(path).problems == []
    assert len(open_store(path).layers) == 1
    counts.add("together", other_plan=1)
