"""Variation of a number on other text: percentile bootstrap over sequences.

Tokens of a sequence are alike, so sequences are resampled and never tokens. Every metric is a ratio
of sums over sequences; a resample weights each sequence's part of the sums by how often it was
drawn (Efron and Tibshirani, 1993, ch. 13).

Shapes: S sequences, G groups, R resamples.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

NUM_RESAMPLES = 1000
MAX_GROUPS = 1024
"""Most groups whose sums are held apart: bounds memory and time, whatever the number of
sequences. Up to as many sequences, each is a group; beyond, sequences that follow one another."""
LEVEL = 0.95
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; None where it is not defined."""

    value: float | None
    """Over the sequences as they are."""

    low: float | None
    """2.5th percentile over the resamples; None where the number is undefined in one of them, or
    there are none."""

    high: float | None
    """97.5th percentile."""


def count_groups(num_sequences: int) -> int:
    """G: one for each sequence, at most `MAX_GROUPS`."""
    return min(num_sequences, MAX_GROUPS)


def group_of(places_N: Int, num_sequences: int) -> Int:
    """The group of each sequence by its place among the `num_sequences`, 0 … G − 1.

    Sequences that follow one another share a group, and no two groups differ by more than one.
    """
    return places_N * count_groups(num_sequences) // num_sequences


def group_weights(num_groups: int) -> Float:
    """Weight of each group, (1 + R, G): one each in the first row, then the resamples.

    A pure function of `num_groups`, so that numbers of other layers, measured on the same
    sequences, are resampled alike. R is 0 for fewer than two groups, which say nothing of others.
    """
    if num_groups < 2:
        return np.ones((1, num_groups))
    generator = np.random.default_rng(_SEED)
    drawn = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), NUM_RESAMPLES)
    return np.concatenate([np.ones((1, num_groups)), drawn.astype(np.float64)])


def ratio(numerator: Float, denominator: Float) -> Float:
    """The quotient, element by element; NaN where the denominator is not above 0."""
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


def estimate(values: Float) -> Estimate:
    """A number (1 + R,), computed with each row of `group_weights`, and its interval."""
    value = None if np.isnan(values[0]) else float(values[0])
    if len(values) == 1 or np.isnan(values).any():
        return Estimate(value, None, None)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values[1:], [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
