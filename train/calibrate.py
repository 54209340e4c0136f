"""Threshold of an SAE whose rows shared a budget in training: as many latents a row in the mean.

θ is found from the final weights over the held-out rows: the count of pre-activations above θ is k
times the rows, as nearly as a histogram tells, whose bins are 2⁻¹² of a value wide. It holds only
pre-activations above a bound that rises as rows are seen: where k · (all rows) are above a number
already, θ is no smaller.

Shape suffixes: B rows, N latents.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from mlsae.sae import SAE, Architecture
from mlsae.sae.kernels.above import block_rows, product
from mlsae.store import AnyStore
from mlsae.train.data.decode import RowDecoder
from mlsae.train.running.evaluate import row_blocks
from mlsae.train.step.auxiliary import Sum

_SHIFT = 11
"""Bits of a float32 below those that tell its bin: 12 of its 23 after the point are left."""
_NUM_BINS = 0x7F800000 >> _SHIFT
"""Bins of all finite numbers from 0 on, in their order."""


class Histogram:
    """Counts of pre-activations, those that may decide a threshold.

    Args:
        most: values wanted above the threshold, at most.
        device: device of the values.
    """

    def __init__(self, most: int, device: torch.device) -> None:
        self.counts = torch.zeros(_NUM_BINS, dtype=torch.int64, device=device)
        """(_NUM_BINS,) values by bin."""
        self._most = most
        self._least = self._num_held = 0

    def add(self, pre_BN: torch.Tensor) -> None:
        """Count the values from the bound on; where they are plenty, raise it."""
        values = pre_BN[pre_BN >= _edge(self._least)].float()
        self.counts += torch.bincount(values.view(torch.int32) >> _SHIFT, minlength=_NUM_BINS)
        self._num_held += len(values)
        if self._num_held > 2 * self._most:
            above = self._above()
            self._least = int((above >= max(1, self._most)).sum()) - 1
            self._num_held = int(above[self._least])

    def threshold(self, wanted: int) -> float:
        """Number with as many values above it as wanted, or nearly; with all where they are fewer.

        Args:
            wanted: at most `most`.
        """
        # Bins below the bound lack values, but have no fewer above them than the bound's.
        off = (self._above() - wanted).abs().flip(0)
        nearest = _NUM_BINS - 1 - int(off.argmin())
        # The largest number below the bin: all values in it are above.
        return float(np.nextafter(np.float32(_edge(nearest)), np.float32(0)))

    def _above(self) -> torch.Tensor:
        """(_NUM_BINS,) values in each bin and those after it."""
        return self.counts.flip(0).cumsum(0).flip(0)


def _edge(bin_: int) -> float:
    """Least number in a bin."""
    return float(np.array([bin_ << _SHIFT], np.int32).view(np.float32)[0])


def is_calibrated(architecture: Architecture) -> bool:
    """True where an SAE's threshold is set after training."""
    return architecture.calibrated_l0 is not None


@torch.no_grad()
def calibrate(
    sae: SAE,
    store: AnyStore,
    site: str,
    layers: tuple[int, ...],
    sequences: npt.NDArray[np.int64],
    *,
    skip_positions: int,
    rank: int,
    world_size: int,
    sum_over_ranks: Sum,
    report: Callable[[int], object] = lambda _: None,
) -> None:
    """Set `threshold` so that held-out rows use as many latents as `calibrated_l0` says.

    Position 0 is out. One threshold serves all layers, or each layer has its own.

    Args:
        sae: an SAE on its device, after its last step.
        store: the store.
        site: site of the store.
        layers: layers of the store.
        sequences: (n,) the sequences held out, over all ranks.
        skip_positions: first positions of a sequence that are left out.
        rank: this rank takes every world_size-th sequence.
        world_size: number of ranks.
        sum_over_ranks: adds up over them.
        report: called with the number of rows of each block, flagged ones too.
    """
    k, device = sae.architecture.calibrated_l0, sae.b.device
    assert k is not None
    decode = RowDecoder(store, site, layers, device)
    threshold = sae.get_parameter("threshold")
    mine = sequences[rank::world_size]
    size = block_rows(sae.config.num_latents, sae.b.element_size())
    groups = [layers] if len(threshold) == 1 else [(layer,) for layer in layers]
    for one, group in enumerate(groups):
        histogram = Histogram(k * len(group) * len(sequences) * store.rows_per_sequence, device)
        num_rows = torch.zeros((), dtype=torch.int64, device=device)
        for layer in group:
            at = layers.index(layer)
            for stored, position, origin in row_blocks(store, site, layer, mine):
                keep = (position >= max(1, skip_positions)).to(device)
                u_BD = sae.standardize(decode(stored, at, origin)[keep].to(sae.b.dtype), at).u
                num_rows += len(u_BD)
                c_BD = u_BD - sae.b
                for start in range(0, len(c_BD), size):
                    pre_BN = product(c_BD[start : start + size], sae.W_enc, sae.b_enc)
                    histogram.add(pre_BN)
                report(len(position))
        histogram.counts = sum_over_ranks(histogram.counts)
        threshold[one] = histogram.threshold(k * int(sum_over_ranks(num_rows)))
