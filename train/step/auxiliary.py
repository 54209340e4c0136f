"""AuxK: dead latents reconstruct what the live ones leave, so that they come back to life.

Source: Gao et al. (2024), arXiv 2406.04093, appendix A.2. With e = u − û (no gradient), ê = W_dec z
without b and z = ReLU of the k_aux largest pre-activations among dead latents alone,

    aux = (1/32) · min(1, num_dead / k_aux) · Σ‖e − ê‖² / Σ‖e‖².

k_aux is several times k, so on all rows this would cost more than everything else. Both sums run
over a random sixteenth of the rows, which leaves the expected gradient as it is.

Shape suffixes: B rows, S sampled rows, D channels, K selected latents.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mlsae.sae import SAE
from mlsae.sae.kernels.functions import bag, preactivations
from mlsae.sae.kernels.select import select
from mlsae.sae.kernels.sparse import Support
from mlsae.train.step.spread import least_share

Sum = Callable[[torch.Tensor], torch.Tensor]
"""Adds a tensor up over ranks."""
COEFFICIENT = 1 / 32
SAMPLE_SHARE = 1 / 16
"""Expected share of a batch's rows that AuxK sees."""
SAMPLE_ROWS = 256
"""Expected number of rows that it sees at least; a batch of no more is seen whole."""
_ROWS = 4096
"""Dead latents whose gradients are added at once."""


class Residual(NamedTuple):
    """Residual of the live latents on the sampled rows; no tensor carries a gradient."""

    u: torch.Tensor
    """(S, D) standardised rows."""
    e: torch.Tensor
    """(S, D) u − û."""


def default_k_aux(d_in: int) -> int:
    """The power of two nearest d_in / 2, the larger one of two equally near."""
    below: int = 2 ** math.floor(math.log2(d_in / 2))
    return below if d_in / 2 - below < 2 * below - d_in / 2 else 2 * below


def sample(x_BD: torch.Tensor, batch_rows: int, seed: int, step: int) -> torch.Tensor:
    """Rows that AuxK sees: (B,) bool.

    A row is chosen by a hash of its own values, so the choice is the same however a batch is cut
    between ranks. Source of the hash: multiply-shift for vectors, Dietzfelbinger (1996).

    Args:
        x_BD: (B, D) rows as stored.
        batch_rows: rows of the whole batch.
        seed: seed of the run.
        step: another one sees other rows.
    """
    share = max(SAMPLE_SHARE, SAMPLE_ROWS / batch_rows)
    if share >= 1:
        return torch.ones(len(x_BD), dtype=torch.bool, device=x_BD.device)
    return hashed(x_BD, seed, step) < math.floor((share - 0.5) * 2**32)


def hashed(x_BD: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """(B,) int64 from −2³¹ up to 2³¹: a hash of each row's own values, another one at each step.

    Every channel counts, and a constant is added: over steps, any row has any hash equally often,
    rows of zeros and rows that differ in one channel alone, too.
    """
    bits = x_BD.float()
    if x_BD.shape[1] % 2:
        bits = torch.nn.functional.pad(bits, (0, 1))
    words = bits.contiguous().view(torch.int64)
    generator = np.random.default_rng((seed, step))
    odd = torch.from_numpy(generator.integers(-(2**62), 2**62, words.shape[1]) * 2 + 1)
    constant = int(generator.integers(-(2**63), 2**63))
    return ((words * odd.to(words.device)).sum(dim=1) + constant) >> 32


def accumulate(
    sae: SAE, residuals: Sequence[Residual], dead: torch.Tensor, k_aux: int, sum_over_ranks: Sum
) -> torch.Tensor:
    """One rank's share of aux, (); its gradient is added to the parameters'.

    Args:
        sae: SAE whose parameters have a `.grad`.
        residuals: residuals of the pieces of this rank's share.
        dead: (num_dead,) indices of the dead latents, the same on every rank; not empty.
        k_aux: latents that may explain a row.
        sum_over_ranks: called once.
    """
    u_SD, e_SD = (torch.cat(parts) for parts in zip(*residuals, strict=True))
    num_dead = len(dead)
    total, squares = sum_over_ranks(torch.stack([e_SD.square().sum(), u_SD.square().sum()]))
    W_enc, W_dec, b = (
        weights.detach().requires_grad_() for weights in (sae.W_enc[dead], sae.W_dec[dead], sae.b)
    )
    with torch.no_grad():
        pre, indices = select(u_SD - b, W_enc, min(k_aux, num_dead))
    support = Support(indices, num_dead)
    values = preactivations(u_SD, W_enc, b, pre, support).relu()
    remainder = (e_SD - bag(values, W_dec, support)).square().sum()
    coefficient = COEFFICIENT * min(1.0, num_dead / k_aux)
    # Rounding is nothing to explain, and 0 / 0 would poison the gradient.
    is_left = total > least_share(standardized=False) * squares
    aux = remainder * torch.where(is_left, coefficient / total, 0.0)
    gradients = torch.autograd.grad(aux, (W_enc, W_dec, b))
    for parameter, gradient in zip((sae.W_enc, sae.W_dec), gradients[:2], strict=True):
        assert parameter.grad is not None
        for start in range(0, len(dead), _ROWS):
            rows = slice(start, start + _ROWS)
            parameter.grad[dead[rows]] += gradient[rows]
    assert sae.b.grad is not None
    sae.b.grad += gradients[2]
    return aux.detach()
