"""Every metric by layer and over layers, with its interval, from the sums of a run.

R = resamples, M = num_latents. Definitions and sources: docs/metrics.md.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlsae.analyze.measure.bootstrap import Float, estimate, group_weights, ratio
from mlsae.analyze.measure.rows.sums import Ratio
from mlsae.analyze.measure.rows.walk import LayerSums

if TYPE_CHECKING:
    from mlsae.analyze.measure.model.cross_entropy import CrossEntropy

FREQUENT = 0.1
"""A latent is frequent if it is active on a larger share of the rows (SAEBench's 10 percent)."""

_ANY = (-math.inf, math.inf)
_RANGES = {
    "explained_variance": (-math.inf, 1.0),
    "cosine": (-1.0, 1.0),
    "density": (0.0, 1.0),
    "top1_agreement": (0.0, 1.0),
    "top1_agreement_spliced": (0.0, 1.0),
    "delta_ce": _ANY,
    "delta_ce_spliced": _ANY,
    "loss_recovered_zero": _ANY,
    "loss_recovered_zero_eligible": _ANY,
    "loss_recovered_mean": _ANY,
}
"""Least and largest value that a number can have; that of the others is from 0 on."""

Columns = dict[str, Any]
"""Value by column of a table; one that is absent is null."""


def describe(
    sums: Mapping[int, LayerSums], entropy: "CrossEntropy | None"
) -> tuple[list[Columns], list[Columns]]:
    """Columns of the tables `layers`, a dict a layer, and `overall`, its two rows.

    Args:
        sums: by layer id.
        entropy: entropies, with layers in the order of `sums`, or None.
    """
    each = [_row_ratios(of) for of in sums.values()]
    of_entropy = None if entropy is None else entropy.ratios()
    values = [_values(ratios) for ratios in each]
    if of_entropy is not None:
        values = [a | _values(b) for a, b in zip(values, of_entropy[:-1], strict=True)]
    counts = np.stack([of.latents.count.cpu().numpy() for of in sums.values()])
    num_rows = [_num_rows(of) for of in sums.values()]
    tokens = {} if entropy is None else entropy.num_targets()
    layers = [
        {**_estimates(v), **n, **_shares(count, n["num_rows"]), **tokens}
        for v, n, count in zip(values, num_rows, counts, strict=True)
    ]
    shares = [_shares(count, n["num_rows"]) for count, n in zip(counts, num_rows, strict=True)]
    mean = {
        "over": "mean",
        **_estimates(_mean(values)),
        **{name: float(np.mean([of[name] for of in shares])) for name in shares[0]},
        **tokens,
    }
    pooled = {name: _pooled([ratios[name] for ratios in each]) for name in each[0]}
    if of_entropy is not None:
        pooled |= _values(of_entropy[-1])
    rows_in_all = {name: sum(n[name] for n in num_rows) for name in num_rows[0]}
    together = {
        "over": "all",
        **_estimates(pooled),
        **rows_in_all,
        **_shares(counts.sum(axis=0), rows_in_all["num_rows"]),
        **tokens,
    }
    return layers, [mean, together]


def _row_ratios(of: LayerSums) -> dict[str, Ratio]:
    weights = group_weights(len(of.eligible.scalars))
    ratios = of.eligible.weighted(weights).ratios(len(of.latents.count))
    for suffix, rows in (("in", of.position_0_in), ("out", of.position_0_out)):
        weighted = rows.weighted(weights)
        ratios[f"fvu_position_0_{suffix}"] = weighted.fvu()
        ratios[f"fvu_published_position_0_{suffix}"] = weighted.fvu_published()
    return ratios


def _num_rows(of: LayerSums) -> dict[str, int]:
    return {
        "num_rows": of.eligible.num_rows,
        "num_rows_position_0_in": of.position_0_in.num_rows,
        "num_rows_position_0_out": of.position_0_out.num_rows,
    }


def _shares(counts_M: npt.NDArray[np.int64], num_rows: int) -> dict[str, float]:
    """Shares of the latents by how many of the rows they are active on."""
    return {
        "dead_fraction": float((counts_M == 0).mean()),
        "frequent_fraction": float((counts_M > FREQUENT * num_rows).mean()),
        "always_on_fraction": float((counts_M == num_rows).mean()),
    }


def _values(ratios: Mapping[str, Ratio]) -> dict[str, Float]:
    return {name: ratio(*of) for name, of in ratios.items()}


def _mean(values: list[dict[str, Float]]) -> dict[str, Float]:
    return {name: np.mean([of[name] for of in values], axis=0) for name in values[0]}


def _pooled(ratios: list[Ratio]) -> Float:
    numerators, denominators = zip(*ratios, strict=True)
    return ratio(np.sum(numerators, axis=0), np.sum(denominators, axis=0))


def _estimates(values: Mapping[str, Float]) -> Columns:
    columns: Columns = {}
    for name, of in values.items():
        found = estimate(of, *_RANGES.get(name, (0.0, math.inf)))
        columns |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return columns
