"""Moments of a shard's rows, summed on the device that computed them.

The same sums that `mlsae.store.moments` makes on the CPU, group by group, so that on a GPU neither
float32 values nor a second pass over the rows ever reaches the host. Sums over the rows of a batch
are matrix products with the indicator of the groups; batches are merged in float64 as Chan, Golub
and LeVeque (1983) do.

Shape suffixes: G groups, N rows, D channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from mlsae.store.moments import GROUPS, STANDARDIZE_EPS, GroupMoments

Key = tuple[str, int]


@dataclass
class _Centred:
    """Rows of a batch about their groups' means."""

    y: torch.Tensor
    """(N, D) float32, x minus the mean of its group."""
    delta: torch.Tensor
    """(G, D) float64, that mean minus the mean of all earlier batches."""
    rest: torch.Tensor
    """(G, D) float64, sums of y: what rounding left of 0."""


class DeviceMoments:
    """Moments by group of every site and layer, of the rows added since the last `take`."""

    def __init__(self, sites: Sequence[str], layers: Sequence[int], d_model: int) -> None:
        self._sites, self._layers, self._d_model = tuple(sites), tuple(layers), d_model
        self._clear()

    def _clear(self) -> None:
        self._count_G = np.zeros(len(GROUPS), np.int64)
        self._sums: dict[Key, dict[str, torch.Tensor]] = {}

    def add(
        self, group_N: npt.NDArray[np.int8], rows: Mapping[Key, torch.Tensor]
    ) -> dict[Key, torch.Tensor]:
        """Add a batch.

        Args:
            group_N: index into `GROUPS` of each row.
            rows: (site, layer) → (N, D) floats as they will be stored, on any device.

        Returns:
            For each key the largest magnitude, a scalar on its device; not finite where a value
            is not.
        """
        block_G = np.bincount(group_N, minlength=len(GROUPS)).astype(np.int64)
        largest = {}
        indicators: dict[torch.device, torch.Tensor] = {}
        for site in self._sites:
            below: _Centred | None = None
            for layer in self._layers:
                x_ND = rows[site, layer].float()
                device = x_ND.device
                if device not in indicators:
                    index = torch.from_numpy(group_N.astype(np.int64)).to(device)
                    indicators[device] = functional.one_hot(index, len(GROUPS)).T.float()
                sums = self._sums.setdefault((site, layer), self._zeros(device))
                merge = _Merge(indicators[device], self._count_G, block_G)
                centred = merge.mean_and_m2(x_ND, sums, "mean", "m2")
                merge.mean_and_m2(_standardized(x_ND), sums, "u_mean", "u_m2")
                if below is not None:
                    before = self._layers[self._layers.index(layer) - 1]
                    merge.cross(below, centred, self._sums[site, before])
                sums["norm_sum"] += merge.sums(x_ND.norm(dim=1, keepdim=True))[:, 0]
                magnitude_N = x_ND.abs().amax(dim=1)
                sums["max_abs"] = merge.largest(sums["max_abs"], magnitude_N)
                largest[site, layer] = magnitude_N.max()
                below = centred
        self._count_G = self._count_G + block_G
        return largest

    def take(self) -> dict[str, GroupMoments]:
        """The moments so far, on the host; the next batch begins anew."""
        result = {}
        for site in self._sites:
            of_site = [self._sums[site, layer] for layer in self._layers]
            tensors = {
                name: torch.stack([sums[name].cpu() for sums in of_site]).numpy()
                for name in ("mean", "m2", "u_mean", "u_m2", "norm_sum", "max_abs", "cross")
            }
            tensors["adjacent_cross"] = tensors.pop("cross")[:-1]
            result[site] = GroupMoments.from_arrays(
                self._layers, self._d_model, {"count": self._count_G, **tensors}
            )
        self._clear()
        return result

    def _zeros(self, device: torch.device) -> dict[str, torch.Tensor]:
        wide = {
            name: torch.zeros(len(GROUPS), self._d_model, dtype=torch.float64, device=device)
            for name in ("mean", "m2", "u_mean", "u_m2")
        }
        narrow = {
            name: torch.zeros(len(GROUPS), dtype=torch.float64, device=device)
            for name in ("norm_sum", "max_abs", "cross")
        }
        return {**wide, **narrow}


class _Merge:
    """One batch into running sums, on one device."""

    def __init__(
        self,
        indicator_GN: torch.Tensor,
        before_G: npt.NDArray[np.int64],
        block_G: npt.NDArray[np.int64],
    ) -> None:
        self._indicator_GN = indicator_GN
        self._group_N = indicator_GN.argmax(dim=0)
        device = indicator_GN.device
        total_G = np.maximum(before_G + block_G, 1)
        self._num_G = torch.from_numpy(np.maximum(block_G, 1)).double().to(device)
        self._share_G = torch.from_numpy(block_G / total_G).to(device)
        self._weight_G = torch.from_numpy(before_G * (block_G / total_G)).to(device)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """(G, columns) float64 sums of (N, columns) over the rows of each group."""
        return (self._indicator_GN @ values).double()

    def mean_and_m2(
        self, values_ND: torch.Tensor, sums: dict[str, torch.Tensor], mean: str, m2: str
    ) -> _Centred:
        """Chan et al. (1983), equation 2.1, with the corrected two-pass sums of the batch."""
        num_G1 = self._num_G[:, None]
        centre_GD = self.sums(values_ND) / num_G1
        # In float32, as it is subtracted: the sums of y make up for what rounding loses.
        centre_GD = centre_GD.float()
        y_ND = values_ND - centre_GD[self._group_N]
        rest_GD = self.sums(y_ND)
        block_m2_GD = self.sums(y_ND.square()) - rest_GD.square() / num_G1
        delta_GD = centre_GD.double() + rest_GD / num_G1 - sums[mean]
        sums[m2] += block_m2_GD + delta_GD.square() * self._weight_G[:, None]
        sums[mean] += delta_GD * self._share_G[:, None]
        return _Centred(y_ND, delta_GD, rest_GD)

    def cross(self, below: _Centred, here: _Centred, sums: dict[str, torch.Tensor]) -> None:
        """Add to the layer below its cross moment with this one."""
        device = sums["cross"].device
        y_ND, delta_GD, rest_GD = (tensor.to(device) for tensor in (here.y, here.delta, here.rest))
        indicator_GN = self._indicator_GN.to(device)
        product_G = (indicator_GN @ (below.y * y_ND).sum(dim=1, keepdim=True)).double()[:, 0]
        product_G -= (below.rest * rest_GD).sum(dim=1) / self._num_G.to(device)
        between_G = (below.delta * delta_GD).sum(dim=1) * self._weight_G.to(device)
        sums["cross"] += product_G + between_G

    def largest(self, before_G: torch.Tensor, magnitude_N: torch.Tensor) -> torch.Tensor:
        """(G,) the larger of what was there and the largest of each group's rows."""
        return before_G.scatter_reduce(0, self._group_N, magnitude_N.double(), "amax")


def _standardized(x_ND: torch.Tensor) -> torch.Tensor:
    centred_ND = x_ND - x_ND.mean(dim=1, keepdim=True)
    num_channels = x_ND.shape[1]
    variance_N1 = centred_ND.square().sum(dim=1, keepdim=True) / max(num_channels - 1, 1)
    return centred_ND / (variance_N1.sqrt() + STANDARDIZE_EPS)
