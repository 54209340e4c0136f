"""Jobs planned before anything is read: none waits for itself, none overwrites waiting rows."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlsae.store import Store, open_store
from mlsae.train.data.jobs import plan
from mlsae.train.data.mixture import Mixture
from mlsae.train.data.window import Window


@pytest.fixture(scope="module")
def store(copied_sample: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(copied_sample(tmp_path_factory.mktemp("jobs") / "acts").path)


@pytest.mark.parametrize("batch_rows", [3, 7, 33, 200, 5000])
@pytest.mark.parametrize("window", [2_000, 20_000, None])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (15, 16)])
@pytest.mark.parametrize("job_runs", [1, 16, 128])
def test_a_place_is_read_over_once_its_row_was_given(
    batch_rows: int,
    window: int | None,
    rank: int,
    world_size: int,
    job_runs: int,
    store: Store,
) -> None:
    """Played step by step: each row lies where it was put, until its step was given."""
    mixture = Mixture.plan(
        store,
        "resid_post",
        store.layers,
        batch_rows=batch_rows,
        seed=5,
        skip_positions=1,
        validation=np.array([3, 20]),
        window=window and window * batch_rows,
    )
    batch_rows, num_batches = mixture.rank_rows(rank, world_size), mixture.num_batches
    memory = Window(mixture, rank, world_size).num_bytes
    assert memory == mixture.window_bytes(rank, world_size)
    for start in (0, mixture.epoch_steps // 2):
        stop = mixture.epoch_steps + 3
        planned = list(plan(mixture, start, stop, rank, world_size, job_runs))
        shares = [share for some in planned for share in some.shares]
        jobs = [job for some in planned for job in some.jobs]
        assert [share.step for share in shares] == list(range(start, stop))
        first_steps = [job.share.step for job in jobs]
        assert first_steps == sorted(first_steps)
        assert [share.num_jobs for share in shares] == [
            first_steps.count(share.step) for share in shares
        ]
        held = np.full(num_batches * batch_rows + 1, -1)
        """Row at each place of the batches, numbered over layers."""
        left, seen = deque(jobs), []
        for share in shares:
            # All that may be read by then is, as if by the fastest of threads.
            while left and left[0].until < share.step + num_batches:
                first_share, until, runs = left.popleft()
                assert 1 <= len(runs.start) <= job_runs
                turn = np.arange(runs.place.shape[1])
                read = turn < runs.num_rows[:, None]
                assert (runs.place[~read] == len(held) - 1).all()
                rows = (runs.reader * store.num_rows + runs.start)[:, None] + turn
                wanted = read & (runs.place < len(held) - 1)
                places = runs.place[wanted]
                # Free until now, each written once, all of batches that the job is for.
                assert (held[places] == -1).all()
                held[places] = rows[wanted]
                assert np.array_equal(held[places], rows[wanted])
                assert ((places // batch_rows - first_share.step) % num_batches).max(
                    initial=0
                ) <= until - first_share.step
            assert not left or left[0].share.step > share.step
            here = share.step % num_batches * batch_rows + np.arange(len(share.layer))
            assert len(here) <= batch_rows
            # Nobody has read over what the step needs.
            assert (held[here] >= 0).all()
            assert np.array_equal(held[here] // store.num_rows, share.layer)
            seen.append(held[here])
            held[here] = -1
        if world_size == 1 and start == 0:
            of_epoch = np.concatenate(seen)[: mixture.epoch_rows]
            rows = np.flatnonzero(mixture.rows.mask(0, store.num_rows))
            layers = np.arange(len(store.layers))[:, None] * store.num_rows
            assert np.array_equal(np.sort(of_epoch), (layers + rows).reshape(-1))
