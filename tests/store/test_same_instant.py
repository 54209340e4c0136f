"""Two producers that begin in one directory at the same instant."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlsae.base.files import remove_stale_partials, write_new_durably
from mlsae.store import PlanMismatchError, create, open_store
from mlsae.store.tools.verify import verify


def produce(path: Path, context_length: int, ready: threading.Barrier, outcomes: list[str]) -> None:
    """A store of twelve rows."""
    ready.wait()
    try:
        with create(
            path, tokens=np.arange(12), context_length=context_length, layers=(0,), d_model=2
        ) as writer:
            if writer.position is not None:
                writer.append({("resid_post", 0): np.ones((12, 2), np.float32)})
    except PlanMismatchError as error:
        outcomes.append(str(error))
    else:
        outcomes.append("made")


@pytest.mark.parametrize("lengths", [(3, 4), (4, 4)], ids=["other plans", "one plan"])
def test_one_plan_wins_and_is_whole(tmp_path: Path, lengths: tuple[int, int]):
    """The other is refused, naming the difference; of one plan both finish."""
    for attempt in range(10):
        path, outcomes = tmp_path / str(attempt), list[str]()
        ready = threading.Barrier(2)
        threads = [
            threading.Thread(target=produce, args=(path, length, ready, outcomes))
            for length in lengths
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refusals = [outcome for outcome in outcomes if outcome != "made"]
        assert len(outcomes) == 2
        assert len(refusals) == len(set(lengths)) - 1
        assert all("context_length: " in refusal for refusal in refusals)
        assert open_store(path).context_length in lengths
        assert verify(path).problems == []


def test_files_are_held_until_they_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Closed before, they could be taken for a dead process's."""
    outcomes, rename = list[str](), Path.rename

    def cleaned_before(partial: Path, target: Path) -> Path:
        remove_stale_partials(tmp_path)
        return rename(partial, target)

    monkeypatch.setattr(Path, "rename", cleaned_before)
    produce(tmp_path / "a", 4, threading.Barrier(1), outcomes)
    assert outcomes == ["made"]
    assert verify(tmp_path / "a").problems == []


def test_a_store_that_begins_while_one_looks_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Files of the new store are not taken for those of somebody else."""
    path, outcomes, list_directory = tmp_path / "a", list[str](), Path.iterdir
    path.mkdir()

    def begin_then_list(directory: Path) -> Iterator[Path]:
        monkeypatch.undo()
        produce(directory, 4, threading.Barrier(1), outcomes)
        return list_directory(directory)

    monkeypatch.setattr(Path, "iterdir", begin_then_list)
    produce(path, 4, threading.Barrier(1), outcomes)
    assert outcomes == ["made", "made"]
    assert verify(path).problems == []


def test_a_file_that_is_there_is_never_replaced(tmp_path: Path):
    assert write_new_durably(tmp_path / "a", b"first")
    assert not write_new_durably(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
