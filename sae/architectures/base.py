"""What an architecture of SAEs is: how rows become latents, and what their use costs.

Everything else is common to all of them: rows are normalised (sae/normalize.py), û = W_dec z + b
is a bag of decoder rows, and state that depends on the layer belongs to the normalisation.

Shape suffixes: B rows, D channels, N latents, K latents of a row.
"""

from typing import NamedTuple, Protocol

import torch

from mlsae.sae.kernels.sparse import Support


class Weights(NamedTuple):
    """The parameters of an SAE."""

    W_enc: torch.Tensor
    """(N, D) encoder directions."""
    W_dec: torch.Tensor
    """(N, D) decoder directions."""
    b: torch.Tensor
    """(D,) subtracted before the encoder, added after the decoder."""
    b_enc: torch.Tensor | None
    """(N,) added to the pre-activations; None for nothing."""


class Architecture(Protocol):
    """How rows become latents."""

    @property
    def unit_decoder(self) -> bool:
        """Whether decoder rows have unit length, always."""

    def most_rows(self, num_latents: int, element_size: int) -> int | None:
        """Rows that one gradient is best taken of; None for any number.

        Args:
            num_latents: N.
            element_size: bytes of a value.
        """

    def activate(
        self, u_BD: torch.Tensor, weights: Weights, *, mixed: bool
    ) -> tuple[torch.Tensor, Support]:
        """The latents of normalised rows, with gradients for W_enc, b and b_enc.

        Args:
            u_BD: (B, D) normalised rows.
            weights: of the SAE.
            mixed: select with a bfloat16 product and re-scored candidates, where the architecture
                selects.

        Returns:
            (B, K) values ≥ 0 and their places, each latent at most once a row.
        """

    def penalty(
        self, values_BK: torch.Tensor, support: Support, weights: Weights
    ) -> torch.Tensor | None:
        """(B,) what the latents of each row cost, with gradients; None for nothing."""
