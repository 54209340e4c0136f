"""Latents of an analysis: a few that a rule chooses, kinds of them, and all in a heat map."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from transformers import AutoTokenizer

from benchmarks.analysis_events import Float, events_by_layer, pairs
from mlsae.analyze import Analysis, load
from mlsae.store import Store

SEEN_OFTEN = 500
"""Activations, over all layers, that a latent has to have to be shown."""
SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Quantiles of the effective number of layers, of latents seen often, that are shown."""
NUM_TOKENS = 6
KINDS = ((0.0, 1.5), (1.5, 3.0), (3.0, np.inf))
"""Effective numbers of layers that latents are sorted by, from and below."""


def described_latents(directory: Path, store: Store, model: Path) -> list[dict[str, Any]]:
    """The latents at quantiles of the effective number of layers, exp(layer_entropy).

    Of those with at least `SEEN_OFTEN` activations, in the order of that number, then of their
    indices. Each with P(layer | latent) and the tokens that have most of its total.
    """
    analysis = load(directory)
    often = analysis.latents.filter(pc.field("count") >= SEEN_OFTEN)
    often = often.sort_by([("layer_entropy", "ascending"), ("latent", "ascending")])
    tokenizer = AutoTokenizer.from_pretrained(model)
    events = events_by_layer(directory)
    keys, counts = pairs(events, len(analysis.latents))
    ids = store.tokens().astype(np.int64)
    found = []
    for quantile in SHOWN:
        row = often.slice(round(quantile * (len(often) - 1)), 1).to_pylist()[0]
        latent = row["latent"]
        totals = np.zeros(int(ids.max()) + 1)
        for of in events.values():
            here = of.latents == latent
            np.add.at(totals, ids[of.tokens[here]], of.values[here])
        largest = np.argsort(-totals, kind="stable")[:NUM_TOKENS]
        found.append(
            {
                "quantile": quantile,
                "latent": latent,
                "count": row["count"],
                "density": row["density"],
                "effective_layers": float(np.exp(row["layer_entropy"])),
                "layers_of_a_pair": float(counts[keys % len(analysis.latents) == latent].mean()),
                "layer_var": row["layer_var"],
                "layer_var_token": row["layer_var_token"],
                "token_entropy": row["token_entropy"],
                "prob": _probs(analysis)[latent].tolist(),
                "tokens": [
                    {
                        "piece": str(tokenizer.convert_ids_to_tokens(int(number))),
                        "share": float(totals[number] / totals.sum()),
                    }
                    for number in largest
                    if totals[number] > 0
                ],
            }
        )
    return found


def kinds_of_latents(directory: Path) -> list[dict[str, Any]]:
    """Living latents by effective number of layers: how many, and what they are like."""
    analysis = load(directory)
    latents = analysis.latents.filter(pc.invert(pc.field("dead")))
    effective = np.exp(latents["layer_entropy"].to_numpy())
    total = latents["total"].to_numpy().sum()
    found = []
    for low, high in KINDS:
        of = latents.filter((effective >= low) & (effective < high))
        group: dict[str, Any] = {
            "low": low,
            "high": None if high == np.inf else high,
            "latents": len(of) / len(latents),
            "total": float(pc.sum(of["total"]).as_py() or 0.0) / total,
        }
        for name in ("density", "mean", "layer_mean", "token_entropy", "embedding_cosine"):
            group[name] = pc.quantile(of[name], 0.5)[0].as_py() if len(of) else None
        found.append(group)
    return found


def heat_map(directory: Path) -> list[str]:
    """P(layer | latent) of the living latents in percent, a line each, by their mean layer."""
    analysis = load(directory)
    prob = _probs(analysis)
    prob = prob[~np.isnan(prob[:, 0])]
    order = np.argsort(prob @ np.arange(prob.shape[1]), kind="stable")
    percent = (100 * prob[order]).round().astype(int)
    return [" ".join(map(str, line)) for line in percent.tolist()]


def _probs(analysis: Analysis) -> Float:
    """(M, L) P(layer | latent), NaN for the dead."""
    prob = analysis.latent_layers["prob"].to_numpy(zero_copy_only=False)
    return np.asarray(prob, dtype=np.float64).reshape(len(analysis.latents), -1)
