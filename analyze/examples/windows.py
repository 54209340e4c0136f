"""Window around an event: tokens, and the values of its latent there.

Shapes: E events (token, layer, latent), P pairs (token, latent) active at any layer, T tokens, L
layers, A events of which it is asked, W = before + 1 + after places of a window.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlsae.analyze.examples.best import stable_order
from mlsae.analyze.selection import Int
from mlsae.base.errors import InputError
from mlsae.store import PADDING, AnyStore

MOST_TOKEN = 2**31 - 1
OUTSIDE = -1
"""Stands for a token id where a window ends before it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Some whole sequences, one after another."""

    ids: Tensor
    """Token ids, (T,) int32."""

    runs: Tensor
    """Number of the stretch of one document in one sequence, (T,) int64; padding is in none."""

    eligible: Tensor
    """True for each token that is an eligible row, (T,) bool."""


def read_text(
    store: AnyStore, sequences: Int, eligible_T: np.ndarray, device: torch.device
) -> Text:
    """The tokens of sequences, sorted indices.

    Raises:
        InputError: a token is over 2³¹ − 1.
    """
    length = store.context_length
    ids, documents, flags = [], [], []
    ends = np.flatnonzero(np.diff(sequences) != 1) + 1
    for run in np.split(sequences, ends):
        span = (int(run[0]) * length, (int(run[-1]) + 1) * length)
        ids.append(store.tokens(*span))
        documents.append(store.documents(*span))
        flags.append(store.token_flags(*span))
    ids_T = np.concatenate(ids)
    if (largest := int(ids_T.max(initial=0))) > MOST_TOKEN:
        raise InputError(
            f"token {largest:,} of {store.place} is over {MOST_TOKEN:,}, the largest that the "
            f"table of examples holds: give --examples 0"
        )
    document_T, is_padding = np.concatenate(documents), (np.concatenate(flags) & PADDING) != 0
    begins = np.arange(len(document_T)) % length == 0
    begins[1:] |= document_T[1:] != document_T[:-1]
    begins |= is_padding
    begins[1:] |= is_padding[:-1]
    return Text(
        ids=torch.from_numpy(ids_T.astype(np.int32)).to(device),
        runs=torch.from_numpy(np.cumsum(begins)).to(device),
        eligible=torch.from_numpy(eligible_T).to(device),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Joined:
    """The events of some tokens, by latent, then token."""

    pairs: Tensor
    """Index of the pair of each event, (E,) int64."""

    keys: Tensor
    """latent · T + token of each pair, (P,) ascending."""

    values: Tensor
    """The value at each layer, (P, L) float32, 0 where the latent is not active."""


def join_layers(
    tokens_E: Tensor,
    layers_E: Tensor,
    latents_E: Tensor,
    values_E: Tensor,
    *,
    num_tokens: int,
    num_layers: int,
) -> Joined:
    """Join events that are active for the same token.

    Args:
        tokens_E: index of the token, ascending.
        layers_E: index of the layer.
        latents_E: latent.
        values_E: value.
        num_tokens: T.
        num_layers: L.
    """
    order = stable_order(latents_E)
    keys_E = latents_E[order] * num_tokens + tokens_E[order]
    begins = torch.ones_like(keys_E, dtype=torch.bool)
    begins[1:] = keys_E[1:] != keys_E[:-1]
    sorted_pair_E = begins.cumsum(0) - 1
    key_P = keys_E[begins]
    values_PL = values_E.new_zeros(len(key_P), num_layers)
    values_PL.view(-1)[sorted_pair_E * num_layers + layers_E[order]] = values_E[order]
    pair_E = torch.empty_like(order)
    pair_E[order] = sorted_pair_E
    return Joined(pairs=pair_E, keys=key_P, values=values_PL)


def windows(
    text: Text,
    joined: Joined,
    pairs_A: Tensor,
    layers_A: Tensor,
    tokens_A: Tensor,
    *,
    before: int,
    after: int,
) -> tuple[Tensor, Tensor]:
    """Tokens and values around events.

    Returns:
        (A, W) int32 token ids, `OUTSIDE` beyond the sequence or the document, and (A, W) float32
        values of the event's latent at its layer, NaN at tokens that are no eligible rows.
    """
    offsets = torch.arange(-before, after + 1, device=tokens_A.device)
    places = tokens_A[:, None] + offsets
    within = (places >= 0) & (places < len(text.ids))
    places = places.clamp(0, len(text.ids) - 1)
    within &= text.runs[places] == text.runs[tokens_A][:, None]
    # A latent's other tokens of the window are among its nearest pairs, one a token.
    near = (pairs_A[:, None] + offsets).clamp(0, len(joined.keys) - 1)
    distance = joined.keys[near] - joined.keys[pairs_A][:, None]
    is_near = (distance >= -before) & (distance <= after)
    values = joined.values.new_zeros(len(pairs_A), len(offsets) + 1)
    values.scatter_(
        1,
        torch.where(is_near, distance + before, len(offsets)),
        joined.values[near, layers_A[:, None]],
    )
    return (
        torch.where(within, text.ids[places], OUTSIDE),
        torch.where(within & text.eligible[places], values[:, :-1], torch.nan),
    )
