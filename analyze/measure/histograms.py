"""The tables `histograms` and `layer_cosine`: how many latents, or pairs of them, are where."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from mlsae.analyze.measure.directions import COSINE_BINS, DISTANCE_BINS, Float, Int
from mlsae.analyze.results.tables import schema

MEAN_BINS = 16
"""Bins a layer for mean layers, as published; whole numbers lie in the middle of one."""

WHOLE_BINS = 16
"""Bins for the distance to a whole number, from 0 to 1/2."""


def histograms_table(
    layer_means_M: Float, layers: tuple[int, ...], counts: Int, provenance: Mapping[str, str]
) -> pa.Table:
    """All bins in every histogram, also the empty ones.

    Args:
        layer_means_M: mean layer by latent; NaN for a dead one.
        layers: the layers' ids.
        counts: pairs of latents by distance and cosine, as in `DecoderPairs`.
        provenance: goes into the schema's metadata.
    """
    means = layer_means_M[np.isfinite(layer_means_M)]
    half = 0.5 / MEAN_BINS
    num_means = (max(layers) - min(layers)) * MEAN_BINS + 1
    mean_edges = min(layers) - half + np.arange(num_means + 1) / MEAN_BINS
    whole_edges = np.linspace(0, 0.5, WHOLE_BINS + 1)
    parts = {
        "layer_mean": (mean_edges, np.histogram(means, mean_edges)[0]),
        "layer_mean_to_whole": (
            whole_edges,
            np.histogram(np.abs(means - np.round(means)), whole_edges)[0],
        ),
        "decoder_cosine": (np.linspace(-1, 1, COSINE_BINS + 1), counts.sum(axis=0)),
    }
    return pa.table(
        [
            np.repeat(list(parts), [len(counts) for _, counts in parts.values()]),
            np.concatenate([edges[:-1] for edges, _ in parts.values()]),
            np.concatenate([edges[1:] for edges, _ in parts.values()]),
            np.concatenate([counts for _, counts in parts.values()]),
        ],
        schema=schema("histograms", provenance),
    )


def layer_cosine_table(counts: Int, provenance: Mapping[str, str]) -> pa.Table:
    """The bins that hold a pair of living latents, by distance between mean layers, then cosine."""
    by_distance, by_cosine = np.nonzero(counts[:-1])
    cosines = np.linspace(-1, 1, COSINE_BINS + 1)
    return pa.table(
        [
            by_distance / DISTANCE_BINS,
            (by_distance + 1) / DISTANCE_BINS,
            cosines[by_cosine],
            cosines[by_cosine + 1],
            counts[by_distance, by_cosine],
        ],
        schema=schema("layer_cosine", provenance),
    )
