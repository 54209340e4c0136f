"""From sums to the tables `layers`, `overall`, `latents` and `latent_layers`.

Shapes: L layers, M = num_latents.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlsae.analyze.measure.decoder import Decoder
from mlsae.analyze.measure.metrics import describe
from mlsae.analyze.measure.model.cross_entropy import CrossEntropy
from mlsae.analyze.measure.rows.joint import JointResult
from mlsae.analyze.measure.rows.walk import LayerSums
from mlsae.analyze.results.columns import LATENTS
from mlsae.analyze.results.distribution import Float, LayerDistribution, layer_distribution
from mlsae.analyze.results.tables import schema


def layers_tables(
    sums: Mapping[int, LayerSums],
    norms: Mapping[int, float],
    pooled_cosines: Mapping[int, float],
    pca: Mapping[int, tuple[int, float]],
    entropy: CrossEntropy | None,
    provenance: Mapping[str, str],
) -> tuple[pa.Table, pa.Table]:
    """`layers`, one row a layer, and `overall`, the mean over layers and all layers together.

    Args:
        sums: by layer id.
        norms: mean norm by layer id.
        pooled_cosines: pooled cosine with the next layer by layer id, where there is one.
        pca: directions and FVU of PCA by layer id, where known for these rows.
        entropy: entropies, with arrays in the order of `sums`, or None.
        provenance: metadata of the schema.
    """
    by_layer, overall = describe(sums, entropy)
    rows = [
        {
            "layer": layer,
            "norm": norms[layer],
            "adjacent_cosine": sums[layer].adjacent_cosine,
            "adjacent_cosine_pooled": pooled_cosines.get(layer),
            **dict(zip(("pca_directions", "fvu_pca"), pca.get(layer, ()), strict=False)),
            **of,
        }
        for layer, of in zip(sums, by_layer, strict=True)
    ]
    return (
        pa.Table.from_pylist(rows, schema=schema("layers", provenance)),
        pa.Table.from_pylist(overall, schema=schema("overall", provenance)),
    )


def layer_means(sums: Mapping[int, LayerSums]) -> Float:
    """Mean layer of each latent, (M,), NaN for a dead one."""
    totals_LM = np.stack([of.latents.total.cpu().numpy() for of in sums.values()])
    return layer_distribution(totals_LM, tuple(sums)).mean


def latents_tables(
    sums: Mapping[int, LayerSums],
    joint: JointResult,
    decoder: Decoder,
    provenance: Mapping[str, str],
) -> tuple[pa.Table, pa.Table]:
    """`latents`, one row a latent, and `latent_layers`, one row a latent and layer, by latent."""
    layers = tuple(sums)
    counts_LM = np.stack([of.latents.count.cpu().numpy() for of in sums.values()])
    totals_LM = np.stack([of.latents.total.cpu().numpy() for of in sums.values()])
    by_total = layer_distribution(totals_LM, layers)
    by_count = layer_distribution(counts_LM.astype(np.float64), layers)
    count_M, total_M = counts_LM.sum(axis=0), totals_LM.sum(axis=0)
    num_rows = sum(of.eligible.num_rows for of in sums.values())
    num_latents = len(count_M)
    latent_M = np.arange(num_latents, dtype=np.int32)
    columns = {
        "latent": latent_M,
        "count": count_M,
        "total": total_M,
        "mean": _nullable(_mean(total_M, count_M)),
        **_moments(by_total, ""),
        **_moments(by_count, "_by_count"),
        "num_layers": (counts_LM > 0).sum(axis=0).astype(np.int32),
        "layer_var_token": _nullable(joint.token_variances),
        "token_entropy": _nullable(joint.token_entropies),
        "num_token_ids": joint.num_token_ids,
        "density": count_M / num_rows,
        "dead": count_M == 0,
        **decoder.columns(),
    }
    latents = pa.table(
        [columns[column.name] for column in LATENTS], schema=schema("latents", provenance)
    )
    latent_layers = pa.table(
        [
            np.repeat(latent_M, len(layers)),
            np.tile(np.asarray(layers, dtype=np.int32), num_latents),
            counts_LM.T.ravel(),
            totals_LM.T.ravel(),
            _nullable(_mean(totals_LM, counts_LM).T.ravel()),
            _nullable(by_total.probs.T.ravel()),
            _nullable(by_count.probs.T.ravel()),
        ],
        schema=schema("latent_layers", provenance),
    )
    return latents, latent_layers


def _moments(distribution: LayerDistribution, suffix: str) -> dict[str, pa.Array]:
    return {
        f"layer_mean{suffix}": _nullable(distribution.mean),
        f"layer_var{suffix}": _nullable(distribution.var),
        f"layer_std{suffix}": _nullable(np.sqrt(distribution.var)),
        f"layer_entropy{suffix}": _nullable(distribution.entropy),
        f"layer_bimodality{suffix}": _nullable(distribution.bimodality),
    }


def _mean(total: npt.NDArray[Any], count: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    out = np.full(total.shape, np.nan)
    np.divide(total, count, out=out, where=count > 0)
    return out


def _nullable(values: npt.NDArray[np.float64]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))
