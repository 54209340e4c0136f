"""What is planned before anything is read: nothing waits for itself, nothing is read over."""

from collections.abc import Callable

import numpy as np
import pytest

from mlsae.store import open_store
from mlsae.train.jobs import plan
from mlsae.train.rows import Mixture
from mlsae.train.window import Window


@pytest.mark.parametrize("batch_rows", [3, 7, 33, 200, 5000])
@pytest.mark.parametrize("window", [2_000, 20_000, None])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (15, 16)])
@pytest.mark.parametrize("job_runs", [1, 16, 128])
def test_a_line_is_read_over_once_its_last_row_was_cut(
    batch_rows: int,
    window: int | None,
    rank: int,
    world_size: int,
    job_runs: int,
    sample_maker: Callable,
) -> None:
    """Played step by step: each row lies where its slice was put, until the step that cuts it."""
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
    num_lines, size = mixture.rank_lines(rank, world_size), mixture.slice_rows
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
        held = np.full((num_lines, size), -1)
        """Which row lies at each place of the window, numbered over layers."""
        needed = [-1] * num_lines
        """The last step that cuts from what a line holds, as far as it is seen."""
        left, seen = jobs, []
        for share in shares:
            while left and left[0].share.step <= share.step:
                (_, after, runs), *left = left
                assert after < share.step
                assert 1 <= len(runs.line) <= job_runs
                for reader, first, num_rows, line, column in zip(
                    *(values.tolist() for values in runs), strict=True
                ):
                    assert needed[line] <= after
                    rows = reader * store.num_rows + first + np.arange(num_rows)
                    held[line] = -1
                    held[line, column : column + num_rows] = rows
            assert len(share.rows) <= mixture.rank_rows(rank, world_size)
            seen.append(held.reshape(-1)[share.rows])
            # Nobody has read over what was to be cut here.
            assert (seen[-1] >= 0).all()
            for line in (share.rows // size).tolist():
                needed[line] = share.step
        if world_size == 1 and start == 0:
            of_epoch = np.concatenate(seen)[: mixture.epoch_rows]
            rows = np.flatnonzero(mixture.rows.mask(0, store.num_rows))
            layers = np.arange(len(store.layers))[:, None] * store.num_rows
            assert np.array_equal(np.sort(of_epoch), (layers + rows).reshape(-1))
