"""From sums to the tables `layers`, `overall`, `latents` and `latent_layers`.

Shapes: L layers, M = num_latents.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlsae.analyze.measure.decoder import Decoder
from mlsae.analyze.measure.metrics import describe
from mlsae.analyze.measure.rows.joint import JointResult
from mlsae.analyze.measure.rows.walk import LayerSums
from mlsae.analyze.results.columns import LATENTS
from mlsae.analyze.results.distribution import Float, LayerDistribution, layer_distribution
from mlsae.analyze.results.tables import schema

if TYPE_CHECKING:
    from mlsae.analyze.measure.model.cross_entropy import CrossEntropy


def layers_tables(
    sums: Mapping[int, LayerSums],
    norms: Mapping[int, float],
    pooled_cosines: Mapping[int, float],
    pca: Mapping[int, tuple[int, float]],
    entropy: "CrossEntropy | None",
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


def prefixes_table(
    sums: Mapping[int, LayerSums],
    widths: tuple[int, ...],
    latents: pa.Table,
    provenance: Mapping[str, str],
) -> pa.Table:
    """`prefixes`, one row a layer and prefix of the latents, then one a prefix over all layers.

    Args:
        sums: by layer id.
        widths: latents in each prefix, ascending.
        latents: the table `latents`.
        provenance: metadata of the schema.
    """
    entropies_M, dead_M = (latents[name].to_numpy() for name in ("layer_entropy", "dead"))
    found, total = [], np.zeros((4, len(widths)))
    for layer, of in sums.items():
        whole = of.eligible.weighted(np.ones((1, len(of.eligible.scalars))))
        rows, scatter = float(whole.num_rows), float(whole.fvu()[1][0])
        error_G, active_G = of.prefixes
        total += [error_G, active_G, np.full(len(widths), scatter), np.full(len(widths), rows)]
        found += _prefixes(widths, error_G, active_G, scatter, rows, layer=layer)
    error_G, active_G, scatter, rows = total[0], total[1], total[2, 0], total[3, 0]
    for at, row in enumerate(_prefixes(widths, error_G, active_G, scatter, rows, layer=None)):
        own = slice(widths[at])
        living_M = entropies_M[own][~dead_M[own]]
        row["layer_entropy"] = float(living_M.mean()) if len(living_M) else None
        row["dead_fraction"] = float(dead_M[own].mean())
        found.append(row)
    return pa.Table.from_pylist(found, schema=schema("prefixes", provenance))


def _prefixes(
    widths: tuple[int, ...],
    error_G: Float,
    active_G: Float,
    scatter: float,
    rows: float,
    layer: int | None,
) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "num_latents": width,
            "num_rows": int(rows),
            "fvu": float(error) / scatter if scatter > 0 else None,
            "l0": float(active) / rows,
        }
        for width, error, active in zip(widths, error_G, active_G, strict=True)
    ]


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
