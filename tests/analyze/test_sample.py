"""Random events of each quarter of a range against all events, sorted, for values of every kind."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.analyze.examples.best import Field, stable_order
from mlsae.analyze.examples.sample import CANDIDATES, RANGES, Sample

Array = npt.NDArray[np.float32]
NUM_LATENTS = 6
VALUES: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "exponential": lambda g, n: g.exponential(size=n),
    "uniform": lambda g, n: g.random(n) + 1e-3,
    "alike": lambda g, n: 5 + 1e-3 * g.standard_normal(n),
    "heavy tail": lambda g, n: g.pareto(0.7, n) + 1e-3,
    "growing": lambda g, n: np.linspace(0.1, 40, n) * (0.5 + g.random(n)),
    "falling": lambda g, n: np.linspace(40, 0.1, n) * (0.5 + g.random(n)),
    "few values": lambda g, n: g.integers(1, 9, n) / 4,
}


def collected(
    latents: npt.NDArray[np.int64], values: Array, scores: npt.NDArray[np.int32], size: int, at: int
) -> tuple[Sample, int]:
    """A sample of a stream that comes `at` events at once, and the most candidates it held."""
    sample = Sample(NUM_LATENTS, size, {"event": Field(1, torch.int64)}, torch.device("cpu"))
    most = 0
    for first in range(0, len(values), at):
        some = slice(first, first + at)
        kept, places = sample.place(
            torch.from_numpy(latents[some]),
            torch.from_numpy(values[some]),
            torch.from_numpy(scores[some]),
        )
        sample.write(places, event=kept[:, None] + first)
        most = max(most, sample.num_candidates)
    return sample, most


def by_definition(
    latents: npt.NDArray[np.int64], values: Array, scores: npt.NDArray[np.int32], size: int
) -> list[set[int]]:
    """The events of the largest scores of each quarter, the earlier of equal ones."""
    found = []
    for latent in range(NUM_LATENTS):
        own = np.flatnonzero(latents == latent)
        largest = values[own].max(initial=0)
        edges = [largest * np.float32(n / RANGES) for n in range(1, RANGES)]
        quarters = sum((values[own] > edge).astype(int) for edge in edges)
        for n in range(RANGES):
            quarter = own[quarters == n]
            found.append(set(quarter[np.lexsort((quarter, -scores[quarter]))][:size].tolist()))
    return found


@pytest.mark.parametrize("at", [37, 1000, 10**6])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", VALUES)
def test_what_is_drawn_is_what_sorting_all_events_gives(kind: str, size: int, at: int) -> None:
    """Though the largest value is known only at the end, and however many events come at once."""
    for seed in range(3):
        generator = np.random.default_rng(seed)
        count = 4000
        # One latent has half of all events, one has none, and few scores are often equal.
        latents = generator.choice([0, 0, 0, 1, 2, 3, 4], count)
        values = VALUES[kind](generator, count).astype(np.float32)
        scores = generator.integers(1, (50, 2**31, 2**31)[seed], count).astype(np.int32)
        sample, most = collected(latents, values, scores, size, at)
        has, fields = sample.read(0, NUM_LATENTS)
        found = [
            set(events[there].tolist())
            for there, events in zip(has.numpy(), fields["event"][:, :, 0].numpy(), strict=True)
        ]
        assert found == by_definition(latents, values, scores, size)
        middle = sample.read(2, 4)[1]["event"]
        assert torch.equal(middle, fields["event"][2 * RANGES : 4 * RANGES])
        if seed:
            assert most < max(2 * CANDIDATES * size * NUM_LATENTS, 0.5 * count)


def test_few_events_of_many_are_kept() -> None:
    """Ten times as many events need no more memory, but for a logarithm."""
    generator = np.random.default_rng(0)
    held = []
    for count in (30_000, 300_000):
        latents = generator.integers(0, NUM_LATENTS, count)
        values = generator.exponential(size=count).astype(np.float32)
        scores = generator.integers(1, 2**31, count).astype(np.int32)
        held.append(collected(latents, values, scores, 4, 1000)[1])
    assert held[1] < 1.5 * held[0] < 1.5 * 2 * CANDIDATES * 4 * NUM_LATENTS


@pytest.mark.parametrize("largest", [3, 2**40, 2**58, 2**62])
def test_integers_are_ordered_stably_whatever_their_size(largest: int) -> None:
    """Also those that leave no room for a place beside them, of either sign."""
    generator = np.random.default_rng(0)
    keys = torch.from_numpy(generator.integers(-largest, largest, 500))
    keys[100:200] = keys[:100]
    expected = sorted(range(500), key=lambda i: (int(keys[i]), i))
    assert stable_order(keys).tolist() == expected
    assert stable_order(keys[:0]).tolist() == []
