"""The active latents of an analysis as arrays, layer by layer.

Shapes: E events, P pairs of a token and a latent, M latents.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.dataset as pd

from mlsae.analyze import load

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Events:
    """Active latents at one layer."""

    tokens: Int
    """(E,) indices in the store."""

    latents: Int
    """(E,)."""

    values: Float
    """(E,) above 0."""


def events_by_layer(directory: Path) -> dict[int, Events]:
    """Layer → its events, from the table `events`."""
    analysis = load(directory)
    found = {}
    for layer in analysis.summary["layers"]:
        table = analysis.events.to_table(
            columns=["token", "latent", "value"], filter=pd.field("layer") == layer
        )
        found[layer] = Events(
            tokens=table["token"].to_numpy().astype(np.int64),
            latents=table["latent"].to_numpy().astype(np.int64),
            values=table["value"].to_numpy().astype(np.float64),
        )
    return found


def pairs(events: dict[int, Events], num_latents: int) -> tuple[Int, Int]:
    """At how many layers each active pair of a token and a latent is active.

    Returns:
        (P,) token · num_latents + latent, ascending, and (P,) the number of its layers.
    """
    keys = np.concatenate([of.tokens * num_latents + of.latents for of in events.values()])
    found, counts = np.unique(keys, return_counts=True)
    return found, counts


def single_over_aggregate(events: dict[int, Events], num_latents: int) -> dict[str, float]:
    """E Var(L | J, T) over E Var(L | J), by mass and with pairs alike, from the events themselves.

    By the definition of a variance, E (L − E(L | j, t))² and E (L − E(L | j))², with none of the
    sums of `mlsae.analyze`.
    """
    keys = np.concatenate([of.tokens * num_latents + of.latents for of in events.values()])
    values = np.concatenate([of.values for of in events.values()])
    layers = np.concatenate([np.full(len(of.values), n) for n, of in events.items()]).astype(float)
    pair_keys, pair_of = np.unique(keys, return_inverse=True)
    totals = np.bincount(pair_of, weights=values)
    of_pair = (np.bincount(pair_of, weights=values * layers) / totals)[pair_of]
    latent_of = (pair_keys % num_latents)[pair_of]
    found = {}
    for name, weights in (("mass", values), ("pair_uniform", values / totals[pair_of])):
        whole = np.bincount(latent_of, weights=weights, minlength=num_latents)
        sums = np.bincount(latent_of, weights=weights * layers, minlength=num_latents)
        of_latent = np.divide(sums, whole, where=whole > 0, out=np.zeros(num_latents))[latent_of]
        single = (weights * (layers - of_pair) ** 2).sum()
        found[name] = float(single / (weights * (layers - of_latent) ** 2).sum())
    return found


def shared(events: dict[int, Events], num_latents: int) -> list[dict[str, Any]]:
    """Share of a token's active latents that are active at both of every two layers.

    Twice the latents active at both, over those active at the one and at the other.
    """
    keys = {n: np.sort(of.tokens * num_latents + of.latents) for n, of in events.items()}
    layers = sorted(keys)
    return [
        {
            "layers": [low, high],
            "shared": 2
            * len(np.intersect1d(keys[low], keys[high], assume_unique=True))
            / (len(keys[low]) + len(keys[high])),
        }
        for place, low in enumerate(layers)
        for high in layers[place + 1 :]
    ]


def entropies(ids_E: Int, latents_E: Int, weights_E: Float, num_latents: int) -> Float:
    """−Σ p ln p of each latent, p the share of a token id in its weights; (M,), NaN for none."""
    keys, place = np.unique(latents_E * (ids_E.max(initial=0) + 1) + ids_E, return_inverse=True)
    totals = np.bincount(place, weights=weights_E, minlength=len(keys))
    latents = keys // (ids_E.max(initial=0) + 1)
    whole = np.bincount(latents, weights=totals, minlength=num_latents)
    p = totals / whole[latents]
    entropy = -np.bincount(latents, weights=p * np.log(p), minlength=num_latents)
    return np.where(whole > 0, np.abs(entropy), np.nan)


def strongest(of: Events, count: int) -> npt.NDArray[np.bool_]:
    """(E,) whether an event is among its latent's `count` largest, of latents with so many."""
    order = np.lexsort((-of.values, of.latents))
    latents = of.latents[order]
    first = np.flatnonzero(np.concatenate([[True], latents[1:] != latents[:-1]]))
    lengths = np.diff(np.append(first, len(latents)))
    rank = np.arange(len(latents)) - np.repeat(first, lengths)
    chosen = np.zeros(len(latents), dtype=bool)
    chosen[order] = (rank < count) & (np.repeat(lengths, lengths) >= count)
    return chosen
