"""Bound on the error of a product of numbers rounded to bfloat16.

With c = c̃ + δc and w = w̃ + δw, rounded values with a tilde: c·w = c̃·w̃ + δc·w̃ + c·δw, so by
Cauchy and Schwarz |c·w − c̃·w̃| ≤ |δc||w̃| + |c||δw|. Both norms of differences are computed, not
bounded by a unit of rounding: that halves the sum. Sums of D products, added in float32 in any
order, differ from the exact ones by at most D · 2⁻²⁴ |c||w|, to first order, twice here: in the
product and in the float32 value that it stands for. Source: Higham, Accuracy and Stability of
Numerical Algorithms (2nd edition, 2002), §3.1.

Shape suffixes: B rows, D channels, N latents.
"""

import torch

_UNIT = 2.0**-8
"""Largest relative error of a number rounded to bfloat16."""
_LEAST_NORM = 2.0**-60
"""Least norm of rows and of the longest direction: far below, products are flushed to 0."""
_CHUNK = 256
"""Directions at once: in the cache of a core."""


class Screen:
    """Directions in bfloat16, and how much their products with rows may be off.

    Args:
        W_ND: (N, D) float32 directions.
    """

    def __init__(self, W_ND: torch.Tensor) -> None:
        self.W_ND = torch.empty_like(W_ND, dtype=torch.bfloat16)
        """(N, D) bfloat16."""
        norms = torch.empty(2, len(W_ND), device=W_ND.device)
        for start in range(0, len(W_ND), _CHUNK):
            rows = slice(start, start + _CHUNK)
            rounded = self.W_ND[rows].copy_(W_ND[rows])
            torch.linalg.vector_norm(rounded, dim=1, dtype=torch.float32, out=norms[0, rows])
            torch.linalg.vector_norm(W_ND[rows] - rounded, dim=1, out=norms[1, rows])
        self._longest, self._most_off = norms.amax(dim=1)

    def most(self, c_BD: torch.Tensor, c16_BD: torch.Tensor, seen_B: torch.Tensor) -> torch.Tensor:
        """The most that c · w can be where the product in bfloat16 is at most so much.

        Args:
            c_BD: (B, D) float32 rows.
            c16_BD: (B, D) the same, rounded to bfloat16.
            seen_B: (B,) of each row, products in bfloat16 or float32.

        Returns:
            (B,) float32; infinite where nothing can be said.
        """
        norm_B, error_B = self._errors(c_BD, c16_BD)
        seen_B = seen_B.float()
        most_B = seen_B + seen_B.abs() * _UNIT * (1 + _UNIT) + error_B * (1 + _UNIT)
        is_known = (norm_B >= _LEAST_NORM) & (self._longest >= _LEAST_NORM) & most_B.isfinite()
        return torch.where(is_known, most_B, torch.inf)

    def seen(self, c_BD: torch.Tensor, c16_BD: torch.Tensor, value: float) -> torch.Tensor:
        """A product in bfloat16, at most which means that c · w is at most about `value`.

        Args:
            c_BD: (B, D) float32 rows.
            c16_BD: (B, D) the same, rounded to bfloat16.
            value: a number above 0.

        Returns:
            (B,) bfloat16, at least 0; `most` says how much c · w can be there.
        """
        _, error_B = self._errors(c_BD, c16_BD)
        seen_B = (value - error_B * (1 + _UNIT)) / (1 + _UNIT * (1 + _UNIT))
        # Half of the bits are cut off: nothing is rounded up.
        bits_B = seen_B.clamp(min=0).view(torch.int32) >> 16
        return bits_B.to(torch.int16).view(torch.bfloat16)

    def _errors(
        self, c_BD: torch.Tensor, c16_BD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) |c|, and (B,) bound on the error of c's products before they are rounded."""
        norm_B = torch.linalg.vector_norm(c_BD, dim=1)
        off_B = torch.linalg.vector_norm(c_BD - c16_BD, dim=1)
        sums = c_BD.shape[1] * 2.0**-22
        return norm_B, off_B * self._longest + norm_B * (self._most_off + sums * self._longest)
