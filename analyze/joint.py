"""One pass over tokens with the latents of all their layers at hand.

Shapes: N tokens of a block, P active pairs (token, latent).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mlsae.analyze.decomposition import Decomposition, pairs_of
from mlsae.analyze.pairing import Pairing
from mlsae.analyze.selection import Int, Single, read_rows
from mlsae.analyze.token_totals import TokenTotals
from mlsae.sae import SAE
from mlsae.store import AnyStore

PUBLISHED_BATCH = 2048
"""Tokens of a batch in the published code, and of a block here."""


@dataclass(frozen=True, eq=False)
class Joint:
    """What the tokens add up to."""

    decomposition: Decomposition
    """Variances of the layer."""

    token_totals: TokenTotals
    """Totals by latent and token id, over all layers."""


@torch.no_grad()
def sweep_tokens(
    pairing: Pairing, sequences: Int, *, batch_rows: int, progress: Callable[[int], object]
) -> Joint:
    """Encode the eligible rows of `sequences` at all layers, block by block of tokens.

    Memory: a chunk and a block of every layer, and what `Joint` holds.

    Args:
        pairing: store and SAE.
        sequences: sorted indices.
        batch_rows: rows encoded at once.
        progress: told the number of rows, over all layers, of each finished block.
    """
    num_latents = pairing.sae.config.num_latents
    joint = Joint(Decomposition(pairing.layers, num_latents, pairing.device), TokenTotals())
    for tokens_N, latents in _blocks(pairing, sequences, batch_rows):
        pairs = pairs_of(latents, num_latents)
        joint.decomposition.add(pairs, len(tokens_N))
        ids_N = token_ids(pairing.store, tokens_N)
        joint.token_totals.add(
            pairs.latents.cpu().numpy(),
            ids_N[pairs.tokens.cpu().numpy()],
            pairs.totals.cpu().numpy(),
        )
        progress(len(tokens_N) * len(latents))
    return joint


def _blocks(
    pairing: Pairing, sequences: Int, batch_rows: int
) -> Iterator[tuple[Int, dict[int, tuple[torch.Tensor, torch.Tensor]]]]:
    """Tokens (N,) of each block, and layer → their latents' values and indices."""
    store, length = pairing.store, pairing.store.context_length
    # Flags and chunks are those of rows, whatever the layer: every reader gives the same rows.
    readers = {
        layer: read_rows(store, pairing.site, layer, sequences, PUBLISHED_BATCH)
        for layer in pairing.layers
    }
    while True:
        latents = {}
        for layer, reader in readers.items():
            if (block := next(reader, None)) is None:
                return
            _, tokens, x = block
            eligible = tokens % length >= pairing.skip_positions
            latents[layer] = encode_rows(
                pairing.sae, x[eligible], layer, batch_rows=batch_rows, device=pairing.device
            )
        yield tokens[eligible], latents


def encode_rows(
    sae: SAE, x_ND: Single, layer: int, *, batch_rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices (N, K) of rows of a layer, `batch_rows` at once; N may be 0."""
    rows = torch.from_numpy(x_ND).to(device)
    encoded = [
        sae.encode(rows[first : first + batch_rows], layer)
        for first in range(0, max(1, len(rows)), batch_rows)
    ]
    width = max(part.values.shape[1] for part in encoded)
    # The slots that a part has too few of hold the value 0, which is no activation.
    values, indices = (
        torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in of])
        for of in (
            [part.values for part in encoded],
            [part.indices for part in encoded],
        )
    )
    return values, indices


def token_ids(store: AnyStore, tokens_N: Int) -> Int:
    """The ids of tokens, given by their indices, ascending."""
    length = store.context_length
    ids = np.empty(len(tokens_N), dtype=np.int64)
    sequences = tokens_N // length
    for sequence in np.unique(sequences).tolist():
        start = sequence * length
        here = slice(*np.searchsorted(sequences, [sequence, sequence + 1]))
        ids[here] = store.tokens(start, start + length)[tokens_N[here] - start]
    return ids
