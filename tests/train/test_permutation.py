"""Keyed permutations are bijections, and every arrangement is as likely as any other."""

import itertools
import math

import numpy as np
import pytest

from mlsae.train.data.permutation import NUM_ROUNDS, derive_keys, mix, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 100, 1023, 4096, 65_537])
def test_permute_is_a_bijection(size: int) -> None:
    """Every value of the range is taken once."""
    out = permute(np.arange(size), size, derive_keys(NUM_ROUNDS, "test", size))
    assert np.array_equal(np.sort(out), np.arange(size))


def test_another_key_gives_another_permutation() -> None:
    """Seed, epoch and layer all enter the key, each in its own place."""
    keys = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 12), (0, 1, 20)]
    seen = {tuple(permute(np.arange(50), 50, derive_keys(NUM_ROUNDS, *key))) for key in keys}
    assert len(seen) == len(keys)


def test_keys_may_differ_by_index() -> None:
    """One call over several layers equals one call a layer."""
    keys = np.stack([derive_keys(NUM_ROUNDS, "layer", i) for i in range(3)])
    layer, index = np.array([0, 2, 1, 2]), np.array([5, 0, 9, 7])
    together = permute(index, 10, keys[layer])
    apart = [permute(index[i : i + 1], 10, keys[layer[i]])[0] for i in range(4)]
    assert together.tolist() == apart


def chi_square(observed: np.ndarray, expected: float) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_arrangements_of_a_tiny_range_are_equally_likely(size: int) -> None:
    """χ² over all size! arrangements stays within 5 standard deviations of its mean."""
    num_keys = 200 * math.factorial(size)
    keys = np.stack([derive_keys(NUM_ROUNDS, size, i) for i in range(num_keys)])
    out = permute(np.tile(np.arange(size), num_keys), size, np.repeat(keys, size, axis=0)).reshape(
        num_keys, size
    )
    names = {p: i for i, p in enumerate(itertools.permutations(range(size)))}
    seen = np.bincount([names[tuple(p)] for p in out.tolist()], minlength=len(names))
    freedom = len(names) - 1
    assert chi_square(seen, num_keys / len(names)) < freedom + 5 * math.sqrt(2 * freedom)


def test_every_place_and_every_pair_of_places_is_equally_likely() -> None:
    """χ² of where index 3 goes, and of the distance between where 3 and 4 go, among 37 places."""
    size, num_keys = 37, 20_000
    keys = np.stack([derive_keys(NUM_ROUNDS, i) for i in range(num_keys)])
    a = permute(np.full(num_keys, 3), size, keys)
    b = permute(np.full(num_keys, 4), size, keys)
    place = np.bincount(a, minlength=size)
    distance = np.bincount((b - a) % size, minlength=size)
    assert distance[0] == 0
    assert chi_square(place, num_keys / size) < 36 + 5 * math.sqrt(72)
    assert chi_square(distance[1:], num_keys / (size - 1)) < 35 + 5 * math.sqrt(70)


def test_mix_equals_the_published_finaliser() -> None:
    """splitmix64 from state 1,234,567 starts with these values (Vigna's reference program)."""
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix(state).tolist() == expected
