"""The arrays a store holds of its text: checked and given out in blocks, however long they are."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.units import counted
from mlsae.store.schema import ALL_FLAGS, TOKEN_ARRAYS

BLOCK_TOKENS = 1 << 18
"""Tokens that are looked at at once: no array as long as the text is made in memory."""


class TokenArrays:
    """tokens, documents and token_flags as their producer gave them; memory maps will do.

    Args:
        tokens: (num_tokens,) integers.
        documents: (num_tokens,) integers; None for the index of each token's sequence.
        token_flags: (num_tokens,) integers; None for zeros.
        context_length: tokens of a sequence.

    Raises:
        InputError: a shape or data type is wrong, or the last sequence is not whole.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.integer[Any]],
        documents: npt.NDArray[np.integer[Any]] | None,
        token_flags: npt.NDArray[np.integer[Any]] | None,
        context_length: int,
    ) -> None:
        self.num_tokens = len(tokens)
        if context_length < 1 or self.num_tokens == 0 or self.num_tokens % context_length:
            raise InputError(
                f"tokens must be whole sequences of context_length {context_length}, "
                f"got {counted(self.num_tokens, 'token')}"
            )
        self._context_length = context_length
        self._given = {"tokens": tokens, "documents": documents, "token_flags": token_flags}
        for name, values in self._given.items():
            if values is None:
                continue
            if values.shape != (self.num_tokens,) or values.dtype.kind not in "iu":
                raise InputError(
                    f"{name} must be integers of shape ({self.num_tokens},), "
                    f"got {values.dtype.name} of shape {values.shape}"
                )

    def block(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """(stop − start,) values of one array in its stored data type, C-contiguous.

        Raises:
            InputError: a value does not fit.
        """
        dtype = np.dtype(TOKEN_ARRAYS[name])
        given = self._given[name]
        if given is None:
            if name == "token_flags":
                return np.zeros(stop - start, dtype)
            return (np.arange(start, stop) // self._context_length).astype(dtype)
        values = given[start:stop]
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > np.iinfo(dtype).max:
            raise InputError(f"{name} must fit {dtype.name}, got {low} to {high}")
        if name == "token_flags" and high > ALL_FLAGS:
            raise InputError(
                f"token_flags may hold bits 0 to 2 (special, padding, masked), got {high}"
            )
        return np.ascontiguousarray(values, dtype)

    def sha256(self, name: str) -> str:
        """Hex SHA-256 of one array's values in order, as stored.

        Raises:
            InputError: a value does not fit.
        """
        digest = hashlib.sha256()
        for start in range(0, self.num_tokens, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, self.num_tokens)
            digest.update(self.block(name, start, stop).data)
        return digest.hexdigest()
