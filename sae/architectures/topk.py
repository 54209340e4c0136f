"""TopK: a row uses its k largest pre-activations, those above 0.

z = ReLU(TopK_k(W_enc (u − b) + b_enc)). Source: Gao et al. (2024), arXiv 2406.04093.

Shape suffixes: B rows, D channels, N latents, K selected latents.
"""

from dataclasses import dataclass

import torch

from mlsae.sae.architectures.base import Weights
from mlsae.sae.kernels.functions import preactivations
from mlsae.sae.kernels.select import select, select_mixed
from mlsae.sae.kernels.sparse import Support


@dataclass(frozen=True)
class TopK:
    """The architecture `topk`."""

    k: int
    """Latents a row may use."""
    unit_decoder: bool = True
    """As for every architecture."""

    def most_rows(self, num_latents: int, element_size: int) -> int | None:  # noqa: ARG002
        """Any number: selection takes blocks of rows by itself."""
        return None

    def activate(
        self, u_BD: torch.Tensor, weights: Weights, *, mixed: bool
    ) -> tuple[torch.Tensor, Support]:
        """The k latents of each row, in no order; with fewer above 0 the others are 0."""
        choose = select_mixed if mixed else select
        W_enc, _, b, b_enc = weights
        if b_enc is not None:
            # A channel of ones carries the bias through the same products.
            W_enc = torch.cat([W_enc, b_enc[:, None]], dim=1)
            b = torch.cat([b, b.new_zeros(1)])
            u_BD = torch.cat([u_BD, u_BD.new_ones(len(u_BD), 1)], dim=1)
        with torch.no_grad():
            pre_BK, indices_BK = choose(u_BD - b, W_enc, self.k)
        support = Support(indices_BK, len(W_enc))
        return preactivations(u_BD, W_enc, b, pre_BK, support).relu(), support

    def penalty(
        self,
        values_BK: torch.Tensor,  # noqa: ARG002
        support: Support,  # noqa: ARG002
        weights: Weights,  # noqa: ARG002
    ) -> torch.Tensor | None:
        """None: k is what keeps latents few."""
        return None
