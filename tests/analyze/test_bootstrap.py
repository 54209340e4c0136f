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
    weights = group_weights(37)
    assert weights.shape == (1 + NUM_RESAMPLES, 37)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 37).all()
    # Draws of a group are binomial: variance 36/37, and none is drawn more than others.
    assert weights[1:].var() == pytest.approx(36 / 37, rel=0.03)
    assert weights[1:].mean(axis=0) == pytest.approx(np.ones(37), abs=0.15)
    np.testing.assert_array_equal(weights, group_weights(37))


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


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """A ratio of means, 2, from 60 sequences of unequal length whose tokens are alike."""
    generator, covered = np.random.default_rng(2), 0
    weights = group_weights(60)
    for _ in range(300):
        length = generator.integers(5, 50, 60).astype(np.float64)
        total = length * generator.normal(2, 1, 60)
        found = estimate(ratio(weights @ total, weights @ length))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 2 <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_there_is_no_interval_of_one_group_or_of_what_is_not_always_defined() -> None:
    ones = group_weights(1)
    assert estimate(ratio(ones @ np.array([3.0]), ones @ np.array([2.0]))) == Estimate(
        1.5, None, None
    )
    weights = group_weights(3)
    rare = weights @ np.array([0.0, 0.0, 1.0])
    assert estimate(ratio(rare, rare)) == Estimate(1.0, None, None)
    assert estimate(ratio(rare, -rare)) == Estimate(None, None, None)
