"""The layer distribution of a latent: planted cases and brute force."""

import math

import numpy as np
import pytest

from mlsae.analyze.results.distribution import layer_distribution


def test_a_latent_at_one_layer_has_that_mean_and_no_variance() -> None:
    totals = np.zeros((4, 2))
    totals[2, 0] = 17.3
    totals[3, 1] = 1e-9
    found = layer_distribution(totals, (0, 5, 7, 11))
    assert found.mean.tolist() == [7.0, 11.0]
    assert found.var.tolist() == [0.0, 0.0]
    assert found.probs[:, 0].tolist() == [0.0, 0.0, 1.0, 0.0]


def test_layer_ids_and_not_their_places_are_averaged() -> None:
    found = layer_distribution(np.array([[1.0], [3.0]]), (2, 10))
    assert found.mean[0] == 8.0
    assert found.var[0] == pytest.approx(0.25 * 36 + 0.75 * 4)


def test_equal_totals_give_the_uniform_variance() -> None:
    found = layer_distribution(np.ones((6, 1)), tuple(range(6)))
    assert found.mean[0] == pytest.approx(2.5)
    assert found.var[0] == pytest.approx(35 / 12)


def test_a_dead_latent_has_no_distribution() -> None:
    found = layer_distribution(np.array([[0.0, 2.0], [0.0, 2.0]]), (0, 1))
    assert np.isnan(found.probs[:, 0]).all()
    assert math.isnan(found.mean[0])
    assert math.isnan(found.var[0])
    assert found.mean[1] == 0.5


def test_random_totals_match_a_loop() -> None:
    totals = np.random.default_rng(0).random((5, 40)) ** 4
    layers = (1, 2, 4, 8, 9)
    found = layer_distribution(totals, layers)
    for j in range(40):
        p = [totals[i, j] / totals[:, j].sum() for i in range(5)]
        mean = sum(q * n for q, n in zip(p, layers, strict=True))
        var = sum(q * n * n for q, n in zip(p, layers, strict=True)) - mean**2
        assert found.mean[j] == pytest.approx(mean, rel=1e-12)
        assert found.var[j] == pytest.approx(var, rel=1e-9)
        bimodality = _bimodality(p, layers)
        assert found.bimodality[j] == pytest.approx(bimodality, rel=1e-9)
        assert 0 < bimodality <= 1
    assert (found.var >= 0).all()


def _bimodality(p: list[float], layers: tuple[int, ...]) -> float:
    """(skewness² + 1) / kurtosis of the standardised layer, by its definition."""
    mean = sum(q * n for q, n in zip(p, layers, strict=True))
    std = math.sqrt(sum(q * (n - mean) ** 2 for q, n in zip(p, layers, strict=True)))
    skewness, kurtosis = (
        sum(q * ((n - mean) / std) ** power for q, n in zip(p, layers, strict=True))
        for power in (3, 4)
    )
    return (skewness**2 + 1) / kurtosis


def test_bimodality_of_known_distributions() -> None:
    """1 at two layers, however unequal; none at one layer; that of a die; near 1/3 for a bell."""
    bell = [math.comb(20, n) for n in range(21)]
    totals = np.zeros((21, 5))
    totals[[3, 11], 0] = (1e-3, 5.0)
    totals[4, 1] = 2.0
    totals[:6, 2] = 1.0
    totals[:, 3] = bell
    found = layer_distribution(totals, tuple(range(21))).bimodality
    assert found[0] == pytest.approx(1, rel=1e-9)
    assert math.isnan(found[1])
    assert found[2] == pytest.approx(1 / (303 / 175), rel=1e-12)
    assert found[3] == pytest.approx(1 / (3 - 2 / 20), rel=1e-9)
    assert math.isnan(found[4])


def test_entropy_is_between_that_of_one_layer_and_that_of_equal_ones() -> None:
    totals = np.array([[0.0, 1.0, 3.0, 0.0], [2.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    found = layer_distribution(totals, (0, 1, 2))
    mixed = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert found.entropy[:3].tolist() == pytest.approx([0.0, math.log(3), mixed], rel=1e-15)
    assert math.copysign(1, found.entropy[0]) == 1
    assert math.isnan(found.entropy[3])
