"""One pass over tokens with the latents of all their layers at hand.

Shapes: N tokens of a block, P active pairs (token, latent).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mlsae.analyze.examples.collect import Examples
from mlsae.analyze.measure.rows.decomposition import Decomposition, pairs_of
from mlsae.analyze.measure.rows.token_totals import TokenTotals
from mlsae.analyze.pairing import Pairing
from mlsae.analyze.selection import Int, Single, read_rows
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
    pairing: Pairing,
    sequences: Int,
    *,
    end_token: int,
    examples: Examples | None,
    batch_rows: int,
    progress: Callable[[int], object],
) -> Joint:
    """Encode the eligible rows of `sequences` at all layers, block by block of tokens.

    Memory: a chunk and a block of every layer, and what `Joint` and `examples` hold.

    Args:
        pairing: store and SAE.
        sequences: sorted indices.
        end_token: what is returned covers the tokens before this one; the end of a sequence.
        examples: gets every block; None for none.
        batch_rows: rows encoded at once.
        progress: told the number of rows, over all layers, of each finished block.
    """
    num_latents = pairing.sae.config.num_latents
    joint = Joint(Decomposition(pairing.layers, num_latents, pairing.device), TokenTotals())
    for rows_N, tokens_N, latents in blocks(pairing, sequences, batch_rows):
        if examples is not None:
            examples.add(rows_N, tokens_N, latents)
        covered = int(np.searchsorted(tokens_N, end_token))
        if covered:
            _add(
                joint,
                pairing,
                tokens_N[:covered],
                {n: (z[:covered], indices[:covered]) for n, (z, indices) in latents.items()},
            )
        progress(len(tokens_N) * len(latents))
    if examples is not None:
        examples.finish()
    return joint


def _add(
    joint: Joint,
    pairing: Pairing,
    tokens_N: Int,
    latents: dict[int, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    pairs = pairs_of(latents, pairing.sae.config.num_latents)
    joint.decomposition.add(pairs, len(tokens_N))
    ids_N = token_ids(pairing.store, tokens_N)
    joint.token_totals.add(
        pairs.latents.cpu().numpy(),
        ids_N[pairs.tokens.cpu().numpy()],
        pairs.totals.cpu().numpy(),
    )


def blocks(
    pairing: Pairing, sequences: Int, batch_rows: int
) -> Iterator[tuple[Int, Int, dict[int, tuple[torch.Tensor, torch.Tensor]]]]:
    """Eligible rows (N,) of each block, N ≥ 0, the token of each, and layer → their latents' values
    and indices.
    """
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
            rows, tokens, x = block
            eligible = tokens % length >= pairing.skip_positions
            latents[layer] = encode_rows(
                pairing.sae, x[eligible], layer, batch_rows=batch_rows, device=pairing.device
            )
        yield rows[eligible], tokens[eligible], latents


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
