"""Sums over tokens that take all layers' latents at once.

Shapes: N rows in a batch, E eligible ones, K active slots a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.analyze.measure.rows.decomposition import Decomposition, pairs_of
from mlsae.analyze.measure.rows.token_totals import TokenTotals
from mlsae.analyze.pairing import Pairing
from mlsae.analyze.selection import Int
from mlsae.store import AnyStore

PUBLISHED_BATCH = 2048
"""Tokens in a batch by the published code, and in a block here."""

LatentsByLayer = Mapping[int, tuple[Tensor, Tensor]]
"""Layer → (rows, K) values and (rows, K) latent indices; K may differ between layers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class JointResult:
    """Numbers that `Joint` gives once all rows are added."""

    layer_variance: Mapping[str, Any] | None
    """Variances of the layer by name; None without an active pair."""

    token_variances: npt.NDArray[np.float64]
    """E Var(L | j, T) of each latent, (M,); NaN for one without a pair."""

    token_entropies: npt.NDArray[np.float64]
    """Entropy of each latent's totals over token ids, (M,) nats; NaN for a dead one."""

    num_token_ids: npt.NDArray[np.int64]
    """Token ids that each latent is active for, (M,)."""


class Joint:
    """Sums over tokens, block by block, independent of the batches they come in.

    Memory: a block, and sums by latent and by token id.

    Args:
        pairing: store and SAE.
        end_token: only tokens before this one are added up; the end of a sequence.
    """

    def __init__(self, pairing: Pairing, end_token: int) -> None:
        num_latents = pairing.sae.config.num_latents
        self.decomposition = Decomposition(pairing.layers, num_latents, pairing.device)
        """Layer variances."""
        self.token_totals = TokenTotals()
        """Totals by latent and token id, over all layers."""
        self._store, self._num_latents, self._end_token = pairing.store, num_latents, end_token
        self._held: list[tuple[Int, LatentsByLayer]] = []
        self._num_held = 0

    def add(
        self, tokens_N: Int, eligible_N: npt.NDArray[np.bool_], latents: LatentsByLayer
    ) -> None:
        """Add rows that come after those in earlier batches.

        Args:
            tokens_N: each unflagged row's token index, ascending.
            eligible_N: True for an eligible row; a block is so many rows, eligible or not.
            latents: the E eligible rows' latents, in order.
        """
        end = int(np.searchsorted(tokens_N, self._end_token))
        before_N = np.concatenate([[0], eligible_N.cumsum()])
        first = 0
        while first < end:
            last = min(end, first + PUBLISHED_BATCH - self._num_held)
            own = slice(int(before_N[first]), int(before_N[last]))
            self._held.append(
                (
                    tokens_N[first:last][eligible_N[first:last]],
                    {layer: (z[own], indices[own]) for layer, (z, indices) in latents.items()},
                )
            )
            self._num_held += last - first
            if self._num_held == PUBLISHED_BATCH:
                self._add_block()
            first = last

    def finish(self) -> JointResult:
        """Add the last block; there are no more rows."""
        if self._held:
            self._add_block()
        entropies, num_ids = self.token_totals.entropies(self._num_latents)
        return JointResult(
            layer_variance=self.decomposition.summary(),
            token_variances=self.decomposition.token_variances().cpu().numpy(),
            token_entropies=entropies,
            num_token_ids=num_ids,
        )

    def _add_block(self) -> None:
        tokens = np.concatenate([tokens for tokens, _ in self._held])
        blocks = [latents for _, latents in self._held]
        self._held, self._num_held = [], 0
        if len(tokens) == 0:
            return
        latents = {layer: joined([block[layer] for block in blocks]) for layer in blocks[0]}
        pairs = pairs_of(latents, self._num_latents)
        self.decomposition.add(pairs, len(tokens))
        ids = token_ids(self._store, tokens)
        self.token_totals.add(
            pairs.latents.cpu().numpy(),
            ids[pairs.tokens.cpu().numpy()],
            pairs.totals.cpu().numpy(),
        )


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Values and indices for rows, one part after another, in as many slots as the widest has."""
    width = max(values.shape[1] for values, _ in parts)
    # The slots that a part has too few of hold the value 0, which is no activation.
    values, indices = (
        torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in of])
        for of in zip(*parts, strict=True)
    )
    return values, indices


def token_ids(store: AnyStore, tokens_N: Int) -> Int:
    """Token ids at ascending indices."""
    length = store.context_length
    ids = np.empty(len(tokens_N), dtype=np.int64)
    sequences = tokens_N // length
    for sequence in np.unique(sequences).tolist():
        start = sequence * length
        here = slice(*np.searchsorted(sequences, [sequence, sequence + 1]))
        ids[here] = store.tokens(start, start + length)[tokens_N[here] - start]
    return ids
