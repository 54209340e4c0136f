"""Measurements of the studies of `benchmarks.analysis` on an analysis, a store and an SAE.

Shapes: N tokens, D channels, M latents, L layers, E events.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

import mlsae.sae
from benchmarks.analysis_events import (
    Events,
    Float,
    Int,
    entropies,
    events_by_layer,
    pairs,
    shared,
    single_over_aggregate,
    strongest,
)
from mlsae.analyze import Analysis, load
from mlsae.store import Store

COLUMNS = (
    "layer",
    "num_rows",
    "cosine",
    "fvu",
    "explained_variance",
    "l0",
    "l1",
    "ce",
    "ce_store",
    "delta_ce",
    "loss_recovered_zero_eligible",
    "loss_recovered_mean",
    "dead_fraction",
    "norm",
    "adjacent_cosine_pooled",
)
STRONGEST = 40
"""Events that the entropy of a latent's strongest ones is taken over."""
COMPARED = 1_500
"""Tokens that are compared with each other, pair by pair."""
EDGES = np.linspace(-1, 1, 41)


def described(directory: Path, store: Store) -> dict[str, Any]:
    """An analysis as JSON: metrics by layer, and how its latents lie in the layers."""
    analysis = load(directory)
    latents = analysis.latents
    num_latents = len(latents)
    events = events_by_layer(directory)
    keys, counts = pairs(events, num_latents)
    num_layers = len(events)
    alive = latents.filter(pc.invert(latents["dead"]))
    over = {row["over"]: row for row in analysis.overall.to_pylist()}
    ids = store.tokens().astype(np.int64)
    variance = analysis.summary["layer_variance"]
    assert len(keys) == variance["num_pairs"], "the decomposition is over other tokens"
    recomputed = single_over_aggregate(events, num_latents)
    layers = [
        {
            **{name: row[name] for name in COLUMNS},
            **_token_entropy(events[row["layer"]], ids, num_latents),
        }
        for row in analysis.layers.to_pylist()
    ]
    return {
        "num_sequences": analysis.summary["num_sequences"],
        "layers": layers,
        "all_layers": {
            name: over["all"][name] for name in ("delta_ce", "ce", "ce_zero_eligible", "ce_mean")
        },
        "dead_fraction": analysis.summary["overall"]["dead_fraction"],
        "mean_layer_std": analysis.summary["overall"]["mean_layer_std"],
        "effective_layers": _mean(np.exp(_column(alive, "layer_entropy"))),
        "num_layers_histogram": _histogram(_column(alive, "num_layers"), num_layers),
        "one_layer_fraction": float((_largest_share(analysis) > 0.9).mean()),
        "layer_variance": variance,
        "recomputed_within": max(
            abs(value / variance[name]["single_over_aggregate"] - 1)
            for name, value in recomputed.items()
        ),
        "pairs_by_layers": _histogram(counts.astype(np.float64), num_layers),
        "shared": shared(events, num_latents),
        "token_entropy": _mean(_column(alive, "token_entropy")),
        **{name: analysis.summary["decoder"][name] for name in ("mmcs", "mmcs_published")},
        "embedding_cosine": analysis.summary["decoder"]["mean_embedding_cosine"],
    }


def _token_entropy(of: Events, ids: Int, num_latents: int) -> dict[str, float | int]:
    """Mean over latents of their entropy over token ids at one layer."""
    counts = np.bincount(of.latents, minlength=num_latents)
    whole = entropies(ids[of.tokens], of.latents, of.values, num_latents)[counts >= STRONGEST]
    top = strongest(of, STRONGEST)
    few = entropies(ids[of.tokens[top]], of.latents[top], of.values[top], num_latents)
    return {
        "token_entropy": _mean(whole),
        "token_entropy_strongest": _mean(few[counts >= STRONGEST]),
        "num_latents_with_entropy": int((counts >= STRONGEST).sum()),
    }


def _largest_share(analysis: Analysis) -> Float:
    """The largest P(layer | latent) of each living latent."""
    prob = analysis.latent_layers["prob"].to_numpy(zero_copy_only=False)
    largest = prob.reshape(len(analysis.latents), -1).max(axis=1)
    return np.asarray(largest[~np.isnan(largest)])


def _column(latents: Any, name: str) -> Float:
    return np.asarray(latents[name].to_numpy(), dtype=np.float64)


def _mean(values: Float) -> float:
    return float(values.mean())


def _histogram(values: Float, num_layers: int) -> list[int]:
    """Counts of the values 1, 2, … `num_layers`."""
    counts: list[int] = np.bincount(values.astype(np.int64), minlength=num_layers + 1)[1:].tolist()
    return counts


def cosines_of_layers(directory: Path, store: Store) -> list[dict[str, Any]]:
    """Pooled cosine of a token's activations at every two layers, about the layers' means.

    Σ⟨x − μ, x′ − μ′⟩ / √(Σ‖x − μ‖² · Σ‖x′ − μ′‖²) over the rows that were analyzed.
    """
    analysis = load(directory)
    tokens = np.unique(events_by_layer(directory)[analysis.summary["layers"][0]].tokens)
    centred = {}
    for layer in analysis.summary["layers"]:
        x = _rows(store, analysis.summary["site"], layer, tokens).astype(np.float64)
        centred[layer] = x - x.mean(axis=0)
    layers = sorted(centred)
    return [
        {
            "layers": [low, high],
            "cosine": float(
                (centred[low] * centred[high]).sum()
                / np.sqrt((centred[low] ** 2).sum() * (centred[high] ** 2).sum())
            ),
        }
        for place, low in enumerate(layers)
        for high in layers[place + 1 :]
    ]


def _rows(store: Store, site: str, layer: int, tokens_N: Int) -> npt.NDArray[np.float32]:
    """(N, D) activations of tokens, ascending, in a store that keeps every position."""
    low, high = int(tokens_N[0]), int(tokens_N[-1]) + 1
    return store.read(site, layer, low, high)[tokens_N - low]


def similarity(directory: Path, sae_directory: Path, store: Store) -> dict[str, Any]:
    """Active latents that two rows share, by the cosine of what the SAE's encoder takes of them.

    Three kinds of pairs: of one token at two layers, of two tokens at one layer, and of two tokens
    at two layers, over `COMPARED` tokens spread evenly over those analyzed. Rows are standardised
    and about the SAE's bias, as encoded. What two rows share is twice the latents active in both,
    over those active in the one and in the other.

    Returns:
        Sums by bin of the cosine, bins between `edges`: of each kind, pairs and what they share.
    """
    analysis = load(directory)
    sae = mlsae.sae.load(sae_directory)
    layers, num_latents = analysis.summary["layers"], len(analysis.latents)
    events = events_by_layer(directory)
    seen = np.unique(events[layers[0]].tokens)
    chosen = seen[np.linspace(0, len(seen) - 1, min(COMPARED, len(seen))).astype(np.int64)]
    directions, active = {}, {}
    for layer in layers:
        x = torch.from_numpy(_rows(store, analysis.summary["site"], layer, chosen))
        with torch.no_grad():
            v = sae.standardize(x).u - sae.b
        directions[layer] = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
        of = events[layer]
        here = np.isin(of.tokens, chosen)
        hot = torch.zeros(len(chosen), num_latents)
        hot[np.searchsorted(chosen, of.tokens[here]), of.latents[here]] = 1
        active[layer] = hot
    found: dict[str, Any] = {"num_tokens": len(chosen), "edges": EDGES.round(6).tolist()}
    sums = {name: np.zeros((2, len(EDGES) - 1)) for name in ("token", "layer", "neither")}
    adjacent = []
    other = ~torch.eye(len(chosen), dtype=torch.bool)
    for low in layers:
        for high in layers:
            if low > high:
                continue
            cosine = directions[low] @ directions[high].T
            number = active[low].sum(1)[:, None] + active[high].sum(1)[None, :]
            both = 2 * (active[low] @ active[high].T) / number
            if low == high:
                above = torch.triu(other, diagonal=1)
                _add(sums["layer"], cosine[above], both[above])
            else:
                _add(sums["token"], cosine.diagonal(), both.diagonal())
                _add(sums["neither"], cosine[other], both[other])
            if (low, high) in pairwise(layers):
                adjacent.append(float(cosine.diagonal().mean()))
    names = {"token": "one_token", "layer": "one_layer", "neither": "neither"}
    for name, into in names.items():
        pairs_of, both_of = sums[name]
        found[into] = {
            "pairs": pairs_of.astype(int).tolist(),
            "shared": [round(float(value), 4) for value in both_of],
        }
    return found | {"adjacent_cosine": adjacent}


def _add(sums: Float, cosine: torch.Tensor, both: torch.Tensor) -> None:
    """Add pairs to the bins of their cosine: how many, and what they share."""
    place = np.clip(np.digitize(cosine.numpy(), EDGES) - 1, 0, len(EDGES) - 2)
    sums[0] += np.bincount(place, minlength=len(EDGES) - 1)
    sums[1] += np.bincount(place, weights=both.numpy(), minlength=len(EDGES) - 1)
