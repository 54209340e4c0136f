"""Where in the layers a latent is active: P(layer | latent) and its moments.

Shapes: L layers, M = num_latents. `layers` are the layers' own ids, which need not be 0 … L−1.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerDistribution:
    """P(l | j) for every latent; NaN for a latent that is never active. All float64."""

    probs: Float
    """(L, M): P(l | j) = total of latent j at layer l / its total over layers."""

    mean: Float
    """(M,): Σ_l l · P(l | j), in layer ids."""

    var: Float
    """(M,): Σ_l (l − mean)² · P(l | j): never negative, and 0 at one layer only."""


def layer_distribution(totals_LM: Float, layers: tuple[int, ...]) -> LayerDistribution:
    """The layer distribution of each latent from the totals of its values by layer.

    The definition is the published one (tim-lawson/mlsae, analysis/dists.py), with the variance
    taken about the mean rather than as a difference of moments, which can fall below zero.

    Args:
        totals_LM: sums of positive values, (num_layers, num_latents).
        layers: the ids of the layers, in the order of the rows of `totals_LM`.
    """
    total_M = totals_LM.sum(axis=0)
    probs = np.full_like(totals_LM, np.nan)
    np.divide(totals_LM, total_M, out=probs, where=total_M > 0)
    ids_L1 = np.asarray(layers, dtype=np.float64)[:, None]
    mean = (ids_L1 * probs).sum(axis=0)
    var = ((ids_L1 - mean) ** 2 * probs).sum(axis=0)
    return LayerDistribution(probs, mean, var)
