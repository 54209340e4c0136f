"""A warning where a few rows or one channel hold a layer's variance, and none where they do not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlsae.harvest.outliers import outlier_lines
from mlsae.store import Store, create, open_store

ROWS = 4096
Make = Callable[[np.ndarray], Store]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(x: np.ndarray) -> Store:
        with create(
            tmp_path / "acts",
            tokens=np.zeros(ROWS, np.int64),
            context_length=64,
            layers=(2,),
            d_model=8,
            encoding="float32",
        ) as writer:
            writer.append({("resid_post", 2): x})
        return open_store(tmp_path / "acts")

    return made


@pytest.fixture
def plain() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32) + 5


def test_ordinary_rows_give_no_warning(make: Make, plain: np.ndarray) -> None:
    assert [line for line in outlier_lines(make(plain), "resid_post") if "rows hold" in line] == []


def test_one_large_channel_is_named_with_its_share(make: Make, plain: np.ndarray) -> None:
    plain[:, 3] *= 10
    store = make(plain)
    eligible = plain[store.eligible(1)].astype(float)
    share = eligible.var(0)[3] / eligible.var(0).sum()
    lines = list(outlier_lines(store, "resid_post"))
    assert f"warning: layer 2 (resid_post): channel 3 holds {share:.0%} of the variance" in lines[0]


def test_a_few_large_rows_are_counted_with_their_share(make: Make, plain: np.ndarray) -> None:
    plain[[101, 2222, 3333, 4001]] *= 100
    store = make(plain)
    eligible = plain[store.eligible(1)].astype(float)
    distances = ((eligible - eligible.mean(0)) ** 2).sum(1)
    share = np.sort(distances)[-4:].sum() / distances.sum()
    (line,) = [line for line in outlier_lines(store, "resid_post") if "rows hold" in line]
    assert f"4 of {len(eligible):,} sampled rows hold {share:.0%} of the variance" in line


def test_large_first_positions_are_out(make: Make, plain: np.ndarray) -> None:
    plain[::64] *= 1000
    lines = list(outlier_lines(make(plain), "resid_post"))
    assert not any("rows hold" in line for line in lines)
