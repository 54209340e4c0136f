"""PCA of each layer, the baseline that an SAE has to beat: r directions for r active latents.

FVU(r) = Σ‖x − μ − V_r V_rᵀ (x − μ)‖² / Σ‖x − μ_l‖², with μ and the r leading eigenvectors V_r of
the covariance found on training rows, and all sums and μ_l taken over the held-out rows.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlsae.store import AnyStore
from mlsae.train.data.decode import RowDecoder
from mlsae.train.running.evaluate import POSITION_0_OUT, row_blocks
from mlsae.train.step.auxiliary import Sum

_LEAST_ROWS, _ROWS_A_CHANNEL = 16384, 32
"""Rows a layer on which PCA is found: so many more than channels that more gain nothing."""

_ROUNDING = 1e-6
"""Share of a sum of squares that is rounding."""


def pca_fvu(
    store: AnyStore,
    site: str,
    layers: tuple[int, ...],
    validation: npt.NDArray[np.int64],
    *,
    skip_positions: int,
    device: torch.device,
    rank: int,
    world_size: int,
    sum_over_ranks: Sum,
    report: Callable[[int], object] = lambda _: None,
) -> Mapping[int, npt.NDArray[np.float64]]:
    """FVU of PCA on the held-out rows, by layer and by number of directions.

    Args:
        store: the store.
        site: site of the store.
        layers: layers of the store.
        validation: (n,) ascending indices of the sequences held out; PCA is found on others.
        skip_positions: first positions of a sequence that are left out, position 0 always.
        device: device of the products.
        rank: this rank takes every world_size-th sequence.
        world_size: number of ranks.
        sum_over_ranks: adds up over them.
        report: called with 1 for each layer done.

    Returns:
        Layer → (d_model + 1,) FVU of r directions, r from 0; NaN where the rows do not vary.
    """
    decode = RowDecoder(store, site, layers, device)
    fitted = _spread(store, validation)[rank::world_size]
    tested = validation[rank::world_size]
    first = max(1, skip_positions)

    def sums(layer: int, about: torch.Tensor, sequences: Any) -> list[torch.Tensor]:
        """Number of rows, their sum (d,) and their products (d, d), about a point, in float64."""
        width = store.d_model
        totals = [about.new_zeros(shape) for shape in ((), (width,), (width, width))]
        for stored, position, origin in row_blocks(store, site, layer, sequences):
            x = decode(stored, layers.index(layer), origin)[position.to(device) >= first].float()
            centred = x - about.float()
            total = centred.sum(0, dtype=torch.float64)
            parts = (about.new_tensor(len(x)), total, centred.T @ centred)
            for total, part in zip(totals, parts, strict=True):
                total += part
        return [sum_over_ranks(total) for total in totals]

    moments = store.moments(site, first)
    found = {}
    for layer in layers:
        about = torch.from_numpy(moments.mean[moments.layers.index(layer)]).to(device)
        count, total, products = sums(layer, about, fitted)
        mean = total / count
        directions = torch.linalg.eigh(products / count - mean.outer(mean)).eigenvectors.flip(1)
        count, total, products = sums(layer, about + mean, tested)
        # Along each direction: held-out rows' squares about the mean of the fitted ones.
        squares = (directions * (products @ directions)).sum(0)
        spread = products.trace() - total.square().sum() / count
        left = products.trace() - torch.cat([squares.new_zeros(1), squares.cumsum(0)])
        # The squares are rounded to 32 bits.
        spread = spread.where(spread > _ROUNDING * products.trace(), torch.nan)
        found[layer] = (left.clamp(min=0) / spread).cpu().numpy()
        report(1)
    return found


def _spread(store: AnyStore, validation: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sequences that are not held out, spread evenly over the store."""
    trained = np.setdiff1d(np.arange(store.num_sequences), validation, assume_unique=True)
    rows = max(_LEAST_ROWS, _ROWS_A_CHANNEL * store.d_model)
    wanted = min(len(trained), -(-rows // store.rows_per_sequence))
    return trained[np.linspace(0, len(trained) - 1, wanted).astype(np.int64)]


def add_pca(
    metrics: Mapping[str, Any],
    fvu: Mapping[int, npt.NDArray[np.float64]],
    num_directions: int | None,
) -> None:
    """Put PCA beside an SAE's FVU by layer: `pca_directions` and `fvu_pca`.

    Args:
        metrics: result of `evaluate`, which gets both.
        fvu: result of `pca_fvu`.
        num_directions: most latents that a row uses; None for the L0 of each layer.
    """
    for entry in metrics[POSITION_0_OUT]["layers"]:
        wanted = num_directions or round(entry["l0"] or 0)
        curve = fvu[entry["layer"]]
        entry["pca_directions"] = min(wanted, len(curve) - 1)
        value = float(curve[entry["pca_directions"]])
        entry["fvu_pca"] = value if np.isfinite(value) else None
