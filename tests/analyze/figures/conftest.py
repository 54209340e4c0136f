"""Parts of an analysis of any size, made up."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch

from mlsae.analyze.measure.directions import decoder_pairs
from mlsae.analyze.measure.histograms import histograms_table, layer_cosine_table
from mlsae.analyze.results.distribution import layer_distribution
from mlsae.analyze.results.tables import schema

Float = npt.NDArray[np.float64]
CE = ("ce", "ce_store", "delta_ce", "kl", "loss_recovered_zero", "loss_recovered_mean")


@pytest.fixture(scope="session")
def make() -> Callable[..., dict[str, Any]]:
    """`make_parts`, for tests, which cannot import this file."""
    return make_parts


def make_parts(
    num_latents: int, layers: tuple[int, ...], *, dead: float = 0.1, measured: bool = True
) -> dict[str, Any]:
    """Plausible tables of an analysis with `num_latents` latents."""
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 3000, (len(layers), num_latents))
    counts[generator.random(counts.shape) < 0.3] = 0
    counts[0] += 1
    counts[:, : int(dead * num_latents)] = 0
    totals = counts * generator.gamma(4, 0.25, counts.shape)
    by_total = layer_distribution(totals, layers)
    by_count = layer_distribution(counts.astype(np.float64), layers)
    is_dead = counts.sum(axis=0) == 0

    def nullable(found: Float) -> pa.Array:
        return pa.array(found, mask=np.isnan(found))

    def of_living(found: Float) -> pa.Array:
        return pa.array(found, mask=is_dead)

    latents = {
        "latent": np.arange(num_latents, dtype=np.int32),
        "density": np.where(is_dead, 0, generator.random(num_latents) ** 4),
        "dead": is_dead,
        "layer_var_token": nullable(by_total.var * generator.beta(2, 2, num_latents)),
        "token_entropy": of_living(generator.gamma(2, 1, num_latents)),
    }
    for name in ("decoder", "embedding", "unembedding"):
        latents[f"{name}_cosine"] = generator.uniform(0.1, 0.9, num_latents)
    if num_latents == 1 or not measured:
        latents["decoder_cosine"] = pa.nulls(num_latents, pa.float64())
    for suffix, of in (("", by_total), ("_by_count", by_count)):
        latents[f"layer_mean{suffix}"] = nullable(of.mean)
        latents[f"layer_std{suffix}"] = nullable(np.sqrt(of.var))
        latents[f"layer_entropy{suffix}"] = nullable(of.entropy)
        latents[f"layer_bimodality{suffix}"] = nullable(of.bimodality)
    by_layer = {
        "latent": np.repeat(np.arange(num_latents), len(layers)),
        "layer": np.tile(layers, num_latents),
        "count": counts.T.ravel(),
        "prob": nullable(by_total.probs.T.ravel()),
        "prob_by_count": nullable(by_count.probs.T.ravel()),
    }
    rows = [_row(n, layer, num_latents, measured) for n, layer in enumerate(layers)]
    rows[-1] |= {"adjacent_cosine": None, "adjacent_cosine_pooled": None}
    few = by_total.mean[:: max(1, num_latents // 1000)]
    directions = torch.from_numpy(generator.normal(size=(len(few), 8)))
    pairs = decoder_pairs(directions, few, max(layers) - min(layers), lambda _: None).counts
    events = [
        {
            "prompt": 0,
            "position": n % 7,
            "token_id": 1,
            "piece": " a",
            "eligible": n % 7 > 0,
            "layer": layers[n % len(layers)],
            "latent": num_latents - 1 if n < 20 else n * n % max(1, num_latents - 1),
            "value": 1e-4 if n < 20 else 1.0 + n,
        }
        for n in range(100)
    ]
    terms = {"total": 4.0, "single": 0.5, "tokens": 1.5, "latents": 2.0, "aggregate": 2.0}
    ratios = {"single_over_aggregate": 0.25, "aggregate_over_total": 0.5}
    return {
        "layers": pa.Table.from_pylist(rows, schema=schema("layers", {})),
        "latents": pa.table(latents),
        "latent_layers": pa.table(by_layer),
        "histograms": histograms_table(by_total.mean, layers, pairs, {}),
        "layer_cosine": layer_cosine_table(pairs, {}),
        "prompts": pa.Table.from_pylist(events, schema=schema("prompts", {})),
        "summary": {
            "prompts": ["Once upon a time"],
            "decoder": {"mmcs": None if num_latents == 1 else 0.345},
            "layer_variance": {
                "mass": terms | ratios,
                "pair_uniform": terms | {"single": 1.0, "tokens": 1.0} | ratios,
                "as_coded": {"single_over_aggregate": 0.0123, "aggregate_over_total": None},
            },
        },
    }


def _row(n: int, layer: int, num_latents: int, measured: bool) -> dict[str, Any]:
    of = {
        "fvu": 0.1 + 0.01 * n,
        "fvu_published": 0.05 + 0.01 * n,
        "cosine": 0.95 - 0.01 * n,
        "relative_reconstruction_bias": 1 + 0.01 * n,
        "l0": 8.0 - 0.1 * n,
        "density": (8.0 - 0.1 * n) / num_latents,
    }
    if measured:
        of |= {name: 0.3 + 0.01 * n + 0.1 * k for k, name in enumerate(CE)}
        of["top1_agreement"] = 0.9
    ends = {f"{name}_{end}": value * by for name, value in of.items() for end, by in _ENDS}
    return {
        "layer": layer,
        "norm": 10.0**n,
        "adjacent_cosine": 0.85,
        "adjacent_cosine_pooled": 0.9,
        "dead_fraction": 0.1,
        "frequent_fraction": 0.02,
        "always_on_fraction": 0.0,
        **of,
        **ends,
    }


_ENDS = (("low", 0.9), ("high", 1.05))
