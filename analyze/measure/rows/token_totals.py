"""Token ids that a latent is active for: the entropy of its totals by token id.

Shapes: P pairs (token, latent), M = num_latents.
"""

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]

_HELD = 2**20
"""Pairs held before they are merged, at least."""


class TokenTotals:
    """Σ of a latent's values by token id, exact, over any number of blocks.

    Memory: 16 bytes for each (latent, token id) that ever occurred together, three times that
    while blocks are merged.
    """

    def __init__(self) -> None:
        self._keys: Int = np.zeros(0, dtype=np.int64)
        self._totals: Float = np.zeros(0)
        self._held: list[tuple[Int, Float]] = []
        self._num_held = 0

    def add(self, latents_P: Int, ids_P: Int, totals_P: Float) -> None:
        """Add totals of latents at token ids, 0 ≤ id < 2³²; a pair may occur again."""
        self._held.append((latents_P << 32 | ids_P, totals_P))
        self._num_held += len(totals_P)
        if self._num_held >= max(_HELD, len(self._keys)):
            self._merge()

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._held)])
        totals = np.concatenate([self._totals, *(totals for _, totals in self._held)])
        self._held, self._num_held = [], 0
        if len(keys) == 0:
            return
        order = np.argsort(keys, kind="stable")
        keys, totals = keys[order], totals[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        self._keys, self._totals = keys[first], np.add.reduceat(totals, first)

    def entropies(self, num_latents: int) -> tuple[Float, Int]:
        """Entropy of each latent's totals over token ids, and the number of ids.

        −Σ p ln p, p a token id's share of the latent's total: the token-distribution entropy of
        Heap et al. (arXiv 2501.17727), over all tokens instead of those where the latent is
        strongest.

        Returns:
            (M,) nats, NaN for a latent that was never active; (M,) ids.
        """
        self._merge()
        latents = self._keys >> 32
        whole = np.bincount(latents, weights=self._totals, minlength=num_latents)
        p = self._totals / whole[latents]
        entropy = -np.bincount(latents, weights=p * np.log(p), minlength=num_latents)
        num_ids = np.bincount(latents, minlength=num_latents)
        # A latent of one token id has entropy 0, not −0.
        return np.where(num_ids > 0, np.abs(entropy), np.nan), num_ids
