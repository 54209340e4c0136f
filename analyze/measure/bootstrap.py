"""Variation of a number on other text: 95% intervals over sequences.

Tokens of a sequence are alike, so sequences are resampled and never tokens. Every metric is a ratio
of sums over sequences, or a mean of such, and is computed again with each sequence's part of the
sums weighted:

- of more than `FEW` sequences, by how often it was drawn: percentile bootstrap (Efron and
  Tibshirani, 1993, ch. 13);
- of `FEWEST` to `FEW`, by leaving each out: Student's t about the jackknife's standard error, and
  Hall's interval, which allows for skewness (1992, J. R. Stat. Soc. B 54, pp. 221–228), the outer
  of their ends. Percentiles would be too narrow: benchmarks/intervals.py measures both. A sample
  so small shows a part of the skewness there is, so three times its skewness is taken.

Shapes: S sequences, G groups, R weightings.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

FEWEST = 10
"""Groups from which there is an interval."""
FEW = 50
"""Groups up to which each is left out instead of drawn."""
NUM_RESAMPLES = 1000
MAX_GROUPS = 1024
"""Most groups whose sums are held apart: bounds memory and time, whatever the number of
sequences. Up to as many sequences, each is a group; beyond, sequences that follow one another."""
LEVEL = 0.95
_SKEWNESS = 3.0
"""Factor of a sample's skewness, by benchmarks/intervals.py: with 1, a cross-entropy that one
sequence in a hundred skews is covered less than nine times in ten."""
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; None where it is not defined."""

    value: float | None
    """Over the sequences as they are."""

    low: float | None
    """Lower end; None where the number is undefined with one of the weightings, or there are too
    few sequences."""

    high: float | None
    """Upper end."""


def count_groups(num_sequences: int) -> int:
    """G: one for each sequence, at most `MAX_GROUPS`."""
    return min(num_sequences, MAX_GROUPS)


def group_of(places_N: Int, num_sequences: int) -> Int:
    """The group of each sequence by its place among the `num_sequences`, 0 … G − 1.

    Sequences that follow one another share a group, and no two groups differ by more than one.
    """
    return places_N * count_groups(num_sequences) // num_sequences


def group_weights(num_groups: int) -> Float:
    """Weight of each group, (1 + R, G): one each in the first row, then the other weightings.

    A pure function of `num_groups`, so that numbers of other layers, measured on the same
    sequences, are weighted alike. R is 0 below `FEWEST` groups, G up to `FEW`, and then
    `NUM_RESAMPLES`.
    """
    ones = np.ones((1, num_groups))
    if num_groups < FEWEST:
        return ones
    if num_groups <= FEW:
        return np.concatenate([ones, 1 - np.eye(num_groups)])
    generator = np.random.default_rng(_SEED)
    drawn = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), NUM_RESAMPLES)
    return np.concatenate([ones, drawn.astype(np.float64)])


def ratio(numerator: Float, denominator: Float) -> Float:
    """The quotient, element by element; NaN where the denominator is not above 0."""
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


def estimate(values: Float, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """A number (1 + R,), computed with each row of `group_weights`, and its interval.

    Args:
        values: the number as it is, and with each other weighting.
        least: lower bound of what the number can be, below which no interval reaches.
        most: upper bound.
    """
    value = None if np.isnan(values[0]) else float(values[0])
    if value is None or len(values) == 1 or np.isnan(values).any():
        return Estimate(value, None, None)
    if len(values) - 1 <= FEW:
        low, high = _jackknifed(value, values[1:])
    else:
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(values[1:], [tail, 1 - tail]).tolist()
    return Estimate(value, max(low, least), min(high, most))


def _jackknifed(value: float, left_out_G: Float) -> tuple[float, float]:
    """The outer ends of Student's interval and of Hall's, from values without each group."""
    num_groups = len(left_out_G)
    influence_G = left_out_G.mean() - left_out_G
    squares = float(np.square(influence_G).sum())
    error = math.sqrt((num_groups - 1) / num_groups * squares)
    if error == 0:
        return value, value
    t = _student(num_groups - 1)
    skewness = float((influence_G**3).sum()) * math.sqrt(num_groups) / squares**1.5
    skewness *= math.sqrt(num_groups * (num_groups - 1)) / (num_groups - 2)
    a = _SKEWNESS * skewness / math.sqrt(num_groups)
    return value - error * max(t, _hall(a, t)), value - error * min(-t, _hall(a, -t))


def _hall(a: float, q: float) -> float:
    """Quantile of a studentised mean whose cubic transformation has the quantile `q`.

    Args:
        a: skewness over √G.
        q: a quantile of Student's distribution.
    """
    if abs(a) < 1e-6:
        return q
    return 3 / a * (float(np.cbrt(1 + a * (q - a / 6))) - 1)


def _student(freedom: int) -> float:
    """Upper quantile of Student's distribution (Abramowitz and Stegun 1964, 26.7.5).

    Its error is below 0.001 from 9 degrees of freedom on.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
