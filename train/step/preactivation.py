"""Pre-activation loss: dead latents are drawn towards their thresholds, so that they fire again.

λ_P · mean over rows of Σ_j ReLU(θ_j − h_j) over dead latents j, with h the pre-activations. It
lowers θ and raises h; decoder rows, of unit length, have no part in it. Source: Anthropic (2025),
"Dictionary learning optimization techniques", Transformer Circuits Thread, January 2025, there for
all latents. On all rows it would cost a dense product, so they are sampled as for AuxK.

Shape suffixes: S sampled rows, D channels, N dead latents.
"""

from collections.abc import Sequence

import torch

from mlsae.sae import SAE
from mlsae.sae.kernels.above import block_rows, product
from mlsae.train.step.auxiliary import Residual, Sum

COEFFICIENT = 1e-3
"""λ_P, for a loss in units of the rows' variance."""


@torch.no_grad()
def accumulate(
    sae: SAE, residuals: Sequence[Residual], dead: torch.Tensor, sum_over_ranks: Sum
) -> torch.Tensor:
    """One rank's share of the loss, (); its gradient is added to the parameters'.

    Args:
        sae: SAE with a `threshold` of each latent, whose parameters have a `.grad`.
        residuals: sampled rows of the pieces of this rank's share.
        dead: (N,) indices of the dead latents, the same on every rank; not empty.
        sum_over_ranks: called once.
    """
    c_SD = torch.cat([residual.u for residual in residuals]) - sae.b
    num_rows = sum_over_ranks(c_SD.new_tensor([len(c_SD)]))
    scale = COEFFICIENT / num_rows.clamp(min=1)
    W_enc, b_enc, threshold = sae.W_enc[dead], sae.b_enc, sae.get_parameter("threshold")
    assert b_enc is not None
    theta_N = threshold[dead]
    loss = c_SD.new_zeros(())
    below_N, rows_ND = torch.zeros_like(theta_N), torch.zeros_like(W_enc)
    for part in torch.split(c_SD, block_rows(len(dead), c_SD.element_size())):
        short_SN = theta_N - product(part, W_enc, b_enc[dead])
        is_below = (short_SN > 0).to(part.dtype)
        loss += (short_SN * is_below).sum()
        below_N += is_below.sum(dim=0)
        rows_ND += is_below.T @ part
    for parameter, gradient in (
        (threshold, below_N),
        (b_enc, -below_N),
        (sae.W_enc, -rows_ND),
    ):
        assert parameter.grad is not None
        parameter.grad[dead] += gradient * scale
    assert sae.b.grad is not None
    sae.b.grad += (below_N @ W_enc) * scale
    return (loss * scale)[0]
