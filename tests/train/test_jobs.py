"""What is planned before anything is read: nothing waits for itself, everything fits its ring."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mlsae.store import open_store
from mlsae.train.jobs import Job, jobs
from mlsae.train.ring import Ring
from mlsae.train.rows import Mixture


def filled_steps(job: Job, ring: Ring) -> Iterator[int]:
    """The steps to whose batches a job writes: the first of their places in the ring to come."""
    for place in job.to[job.to != ring.nowhere].tolist():
        ahead = place // ring.batch_rows - job.share.step
        yield job.share.step + ahead % ring.num_batches


@pytest.mark.parametrize("batch_rows", [3, 7, 33, 200, 5000])
@pytest.mark.parametrize("window", [2_000, 20_000, None])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (15, 16)])
def test_a_job_waits_for_batches_that_are_long_past(
    batch_rows: int, window: int | None, rank: int, world_size: int, sample_maker: Callable
) -> None:
    """So the consumer gets there: two steps lie between. And by then no one uses what it fills."""
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
    ring = Ring(mixture, rank, world_size)
    memory = sum(rows.nbytes for rows in ring.arrays)
    assert memory - store.row_bytes == mixture.window_bytes(rank, world_size)
    for start in (0, mixture.epoch_steps // 2):
        stop = mixture.epoch_steps + 3
        steps = []
        for job in jobs(mixture, ring, start, stop, rank, world_size):
            assert job.after <= job.share.step - 3
            latest = max(filled_steps(job, ring), default=job.share.step)
            assert latest == job.after + ring.num_batches
            assert job.share.num_mine <= ring.batch_rows
            steps.append(job.share.step)
        assert sorted(set(steps)) == list(range(start, stop))
        assert steps == sorted(steps)
