"""The distribution of a latent over layers, P(layer | latent), with moments and entropy.

Shapes: L layers, M = num_latents. `layers` are layer ids, which need not be 0 … L−1.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerDistribution:
    """P(l | j) for every latent; NaN for a latent that is never active. All float64."""

    probs: Float
    """(L, M): P(l | j) = weight of latent j at layer l / its weight over layers."""

    mean: Float
    """(M,): Σ_l l · P(l | j), in layer ids."""

    var: Float
    """(M,): Σ_l (l − mean)² · P(l | j): never negative, and 0 at one layer only."""

    entropy: Float
    """(M,): −Σ_l P(l | j) ln P(l | j), nats: 0 at one layer only, ln L at most."""

    bimodality: Float
    """(M,): (γ² + 1) / κ, γ the skewness and κ the kurtosis of the layer, E(l − mean)ⁿ / stdⁿ for
    n = 3 and 4 (Sarle's coefficient): in (0, 1]; NaN also at one layer only."""


def layer_distribution(weights_LM: Float, layers: tuple[int, ...]) -> LayerDistribution:
    """The layer distribution of each latent from its weights by layer: totals or counts.

    The definition is the published one (tim-lawson/mlsae, analysis/dists.py), with the variance
    taken about the mean rather than as a difference of moments, which can fall below zero.

    Args:
        weights_LM: sums of positive values, or how many there are, (num_layers, num_latents).
        layers: the ids of the layers, in the order of the rows of `weights_LM`.
    """
    weight_M = weights_LM.sum(axis=0)
    probs = np.full(weights_LM.shape, np.nan)
    np.divide(weights_LM, weight_M, out=probs, where=weight_M > 0)
    ids_L1 = np.asarray(layers, dtype=np.float64)[:, None]
    mean = (ids_L1 * probs).sum(axis=0)
    var, third, fourth = (((ids_L1 - mean) ** n * probs).sum(axis=0) for n in (2, 3, 4))
    logs = np.zeros_like(probs)
    np.log(probs, out=logs, where=probs > 0)
    # A latent of one layer has entropy 0, not −0.
    entropy = np.abs((probs * logs).sum(axis=0))
    # γ² = third² / var³ and κ = fourth / var².
    bimodality = np.full_like(var, np.nan)
    np.divide(third**2 + var**3, var * fourth, out=bimodality, where=var > 0)
    return LayerDistribution(probs, mean, var, entropy, bimodality)
