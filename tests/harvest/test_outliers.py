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
    def made(*layers: np.ndarray) -> Store:
        with create(
            tmp_path / "acts",
            tokens=np.zeros(ROWS, np.int64),
            context_length=64,
            layers=range(2, 2 + len(layers)),
            d_model=8,
            encoding="float32",
        ) as writer:
            writer.append({("resid_post", 2 + i): x for i, x in enumerate(layers)})
        return open_store(tmp_path / "acts")

    return made


@pytest.fixture
def plain() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32) + 5


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True)


def of_channel(x: np.ndarray, channel: int) -> float:
    """Share of the variance that a channel holds."""
    return float(x.var(0)[channel] / x.var(0).sum())


def of_largest(x: np.ndarray, few: int) -> float:
    """Share of the variance that the rows farthest from the mean hold."""
    distances = np.sort(((x - x.mean(0)) ** 2).sum(1))
    return float(distances[-few:].sum() / distances.sum())


def test_ordinary_rows_give_no_warning(make: Make, plain: np.ndarray) -> None:
    """Each of 8 channels holds an eighth of the variance, which is no fault of theirs."""
    assert list(outlier_lines(make(plain), "resid_post")) == []


def test_one_large_channel_has_one_line_for_all_its_layers(make: Make, plain: np.ndarray) -> None:
    """With its smallest and largest share, in plain rows and in standardised ones."""
    layers = [plain.copy() for _ in range(3)]
    layers[0][:, 3] *= 10
    layers[2][:, 3] *= 4
    store = make(*layers)
    kept = [x[store.eligible(1)].astype(float) for x in (layers[0], layers[2])]
    raw = [of_channel(x, 3) for x in kept]
    left = [of_channel(standardised(x), 3) for x in kept]
    (line,) = outlier_lines(store, "resid_post")
    assert line == (
        f"warning: layers 2, 4 (resid_post): channel 3 holds {min(raw) * 100:.0f}–{max(raw):.0%} "
        f"of the variance, and {min(left) * 100:.0f}–{max(left):.0%} in standardised rows: train "
        "on those (the default), not with --normalize none or --loss-space raw"
    )


def test_a_channel_that_standardising_leaves_large_is_told_so(
    make: Make, plain: np.ndarray
) -> None:
    """No option of training takes it away."""
    plain[::2, 3] *= 10
    plain[1::2, 3] *= -10
    (line,) = outlier_lines(make(plain), "resid_post")
    assert line.startswith("warning: layer 2 (resid_post): channel 3 holds 100% of the variance")
    assert line.endswith("--skip-positions or layers with --layers")


def test_a_few_large_rows_are_counted_with_their_share(make: Make, plain: np.ndarray) -> None:
    """Standardised, they weigh what others do."""
    plain[[101, 2222, 3333, 4001]] *= 100
    store = make(plain)
    eligible = plain[store.eligible(1)].astype(float)
    raw, left = (of_largest(x, 4) for x in (eligible, standardised(eligible)))
    assert left < 0.01 < 0.5 < raw
    (line,) = [line for line in outlier_lines(store, "resid_post") if "rows hold" in line]
    assert line == (
        f"warning: layer 2 (resid_post): 4 of {len(eligible):,} sampled rows hold {raw:.0%} of the "
        f"variance, and {left:.0%} where rows are standardised: train on those (the default), not "
        "with --normalize none or --loss-space raw"
    )


def test_large_first_positions_are_out(make: Make, plain: np.ndarray) -> None:
    plain[::64] *= 1000
    lines = list(outlier_lines(make(plain), "resid_post"))
    assert not any("rows hold" in line for line in lines)
