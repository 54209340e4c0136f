"""Input to a forward pass: tokens, and the tokens that each may see.

B = sequences, T = positions in a sequence.
"""

from dataclasses import dataclass

import torch

from mlsae.base.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """B sequences of T tokens of packed text.

    Raises:
        InputError: shapes differ, or padding lies before a token of its sequence.
    """

    tokens: torch.Tensor
    """(B, T) integer ids, on any device."""
    documents: torch.Tensor | None = None
    """(B, T) integers: attention stays inside each run of equal documents in a sequence, and
    positions restart at each run. None: a sequence is one text, whatever documents it holds."""
    padding: torch.Tensor | None = None
    """(B, T) bool, True for padding, which may only end a sequence. No token attends to padding;
    outputs at padding are finite and without meaning. None: there is none."""
    first_token: int = 0
    """Index of `tokens[0, 0]` in the packed text; tokens[b, t] is b · T + t after it."""
    indices: torch.Tensor | None = None
    """(B, T) int64 index of each token in the packed text, in place of `first_token`. None: indices
    are consecutive."""

    def __post_init__(self) -> None:
        """Refuse inputs that no forward pass can take."""
        if self.tokens.ndim != 2 or self.tokens.numel() == 0:
            raise InputError(
                "tokens must be some sequences of some positions (B, T), got shape "
                f"{tuple(self.tokens.shape)}"
            )
        for name in ("documents", "padding", "indices"):
            given = getattr(self, name)
            if given is not None and given.shape != self.tokens.shape:
                raise InputError(
                    f"{name} must have the shape of tokens {tuple(self.tokens.shape)}, got "
                    f"{tuple(given.shape)}"
                )
        if self.padding is not None and bool((self.padding[:, :-1] & ~self.padding[:, 1:]).any()):
            raise InputError("padding must end its sequence, got a token after padding")

    def token_indices(self) -> torch.Tensor:
        """(B, T) int64 index of each token in the packed text, on the CPU."""
        if self.indices is not None:
            return self.indices.cpu()
        size = self.tokens.numel()
        return torch.arange(self.first_token, self.first_token + size).view(self.tokens.shape)
