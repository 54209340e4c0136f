"""Resamples of sequences, and the intervals that they give."""

import numpy as np
import pytest

from mlsae.analyze.measure.bootstrap import (
    MAX_GROUPS,
    NUM_RESAMPLES,
    Estimate,
    count_groups,
    estimate,
    group_of,
    group_weights,
    ratio,
)


@pytest.mark.parametrize("num_sequences", [1, 2, 37, MAX_GROUPS, MAX_GROUPS + 1, 5000])
def test_groups_are_of_neighbours_and_alike_in_size(num_sequences: int) -> None:
    groups = group_of(np.arange(num_sequences), num_sequences)
    sizes = np.bincount(groups)
    assert len(sizes) == count_groups(num_sequences) == min(num_sequences, MAX_GROUPS)
    assert (np.diff(groups) >= 0).all()
    assert sizes.max() - sizes.min() <= 1


def test_resamples_draw_as_many_groups_with_replacement_and_always_the_same() -> None:
    weights = group_weights(57)
    assert weights.shape == (1 + NUM_RESAMPLES, 57)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 57).all()
    # Draws of a group are binomial: variance 56/57, and none is drawn more than others.
    assert weights[1:].var() == pytest.approx(56 / 57, rel=0.03)
    assert weights[1:].mean(axis=0) == pytest.approx(np.ones(57), abs=0.15)
    np.testing.assert_array_equal(weights, group_weights(57))


@pytest.mark.parametrize(("num_groups", "num_others"), [(9, 0), (10, 10), (50, 50), (51, 1000)])
def test_few_groups_are_left_out_one_by_one_and_fewer_say_nothing(
    num_groups: int, num_others: int
) -> None:
    weights = group_weights(num_groups)
    assert weights.shape == (1 + num_others, num_groups)
    if num_others == num_groups:
        np.testing.assert_array_equal(weights[1:] == 0, np.eye(num_groups, dtype=bool))
    sums = weights @ np.arange(1.0, num_groups + 1)
    found = estimate(ratio(sums, weights.sum(axis=1)))
    assert found.value == (num_groups + 1) / 2
    assert (found.low is None) == (found.high is None) == (num_others == 0)


@pytest.mark.parametrize(("num_groups", "t"), [(10, 2.262157), (20, 2.093024), (50, 2.009575)])
def test_of_symmetric_values_the_interval_is_student_s(num_groups: int, t: float) -> None:
    """A mean of values that are not skewed: t times the standard error on either side."""
    numerator = np.linspace(-1, 1, num_groups) + 3
    weights = group_weights(num_groups)
    found = estimate(ratio(weights @ numerator, weights @ np.ones(num_groups)))
    error = numerator.std(ddof=1) / np.sqrt(num_groups)
    assert found.low == pytest.approx(3 - t * error, rel=1e-4)
    assert found.high == pytest.approx(3 + t * error, rel=1e-4)


def test_of_skewed_values_the_interval_reaches_further_on_their_long_side() -> None:
    """Hall's interval by its definition: the transformed t has Student's quantile there."""
    numerator = np.random.default_rng(0).exponential(size=20)
    weights = group_weights(20)
    found = estimate(ratio(weights @ numerator, weights @ np.ones(20)), least=0.1)
    error, mean = numerator.std(ddof=1) / np.sqrt(20), numerator.mean()
    skewness = ((numerator - mean) ** 3).mean() / numerator.std() ** 3
    # The sample's skewness without its bias for normal values, three times, over √20.
    a = 3 * skewness * np.sqrt(20 * 19) / 18 / np.sqrt(20)
    assert found.high is not None
    t = (mean - found.high) / error
    # Hall (1992): the cubic that takes the skewness out of t.
    assert t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6 == pytest.approx(-2.093024, rel=1e-3)
    assert found.high - mean > 1.1 * 2.093 * error
    assert found.low == pytest.approx(mean - 2.093024 * error, rel=1e-4)
    assert estimate(ratio(weights @ numerator, weights @ np.ones(20)), most=mean).high == mean


def test_an_interval_is_that_of_resampling_by_hand() -> None:
    generator = np.random.default_rng(1)
    numerator, denominator = generator.normal(3, 1, 200), generator.uniform(1, 2, 200)
    weights = group_weights(200)
    found = estimate(ratio(weights @ numerator, weights @ denominator))
    by_hand = []
    for _ in range(4000):
        drawn = generator.integers(0, 200, 200)
        by_hand.append(numerator[drawn].sum() / denominator[drawn].sum())
    low, high = np.quantile(by_hand, [0.025, 0.975])
    assert found.value == pytest.approx(numerator.sum() / denominator.sum(), rel=1e-12)
    assert found.low == pytest.approx(low, rel=0.02)
    assert found.high == pytest.approx(high, rel=0.02)


@pytest.mark.parametrize("num_groups", [10, 20, 60])
@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_intervals_cover_the_truth_about_as_often_as_they_say(num_groups: int, kind: str) -> None:
    """A ratio of means, 2, from sequences of unequal length whose tokens are alike."""
    generator, covered = np.random.default_rng(2), 0
    weights = group_weights(num_groups)
    for _ in range(300):
        length = generator.integers(5, 50, num_groups).astype(np.float64)
        of_sequence = {
            "normal": generator.normal(2, 1, num_groups),
            "exponential": generator.exponential(2, num_groups),
        }
        total = length * of_sequence[kind]
        found = estimate(ratio(weights @ total, weights @ length))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 2 <= found.high
    assert 0.90 <= covered / 300 <= 0.99


def test_there_is_no_interval_of_one_group_or_of_what_is_not_always_defined() -> None:
    ones = group_weights(1)
    assert estimate(ratio(ones @ np.array([3.0]), ones @ np.array([2.0]))) == Estimate(
        1.5, None, None
    )
    weights = group_weights(12)
    rare = weights @ np.array([0.0] * 11 + [1.0])
    assert estimate(ratio(rare, rare)) == Estimate(1.0, None, None)
    assert estimate(ratio(rare, -rare)) == Estimate(None, None, None)
