"""Jobs planned before anything is read: none waits for itself, none overwrites waiting rows."""

from collections.abc import Callable

import numpy as np
import pytest

from mlsae.store import open_store
from mlsae.train.data.jobs import plan
from mlsae.train.data.mixture import Mixture
from mlsae.train.data.window import Window


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
    sample_maker: Callable,
) -> None:
    """Played step by step: each row lies where it was put, until its step was given."""
    store = open_store(sample_maker().path)
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
        left, seen = jobs, []
        for share in shares:
            # All that may be read by then is, as if by the fastest of threads.
            while left and left[0].until < share.step + num_batches:
                (first_share, until, runs), *left = left
                batches = {step % num_batches for step in range(first_share.step, until + 1)}
                assert 1 <= len(runs.start) <= job_runs
                for reader, first, num_rows, place in zip(*runs, strict=True):
                    wanted = place[place < len(held) - 1]
                    assert (held[wanted] == -1).all()
                    assert batches.issuperset((wanted // batch_rows).tolist())
                    assert (place[num_rows:] == len(held) - 1).all()
                    held[place[:num_rows]] = reader * store.num_rows + first + np.arange(num_rows)
                    held[-1] = -1
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
