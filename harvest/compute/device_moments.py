"""Moments of a shard's rows, summed where the transformer computed them.

The sums that `mlsae.store` would make of the same rows on its own threads: here they run on the
GPU, so that nothing but stored bytes reaches the host (on a CPU, see
`mlsae.harvest.compute.host_moments`).
Sums are of rows about a centre near their mean, kept for a whole shard, so that nothing cancels
(Chan, Golub and LeVeque 1983, equation 1.7); float32 within a piece, float64 between pieces.

Shape suffixes: G groups, P groups of a piece, N rows, D channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.harvest.compute.codecs import Codecs, Key, Parts
from mlsae.store.format.moments import GROUPS, STANDARDIZE_EPS, GroupMoments

PIECE_VALUES = {"cpu": 1 << 18, "cuda": 1 << 30}
"""Values of a piece: on the CPU its tables stay in the caches of two cores."""


@dataclass
class _Sums:
    """Running sums of one quantity, float64 on one device."""

    centre: Tensor
    """float32; the mean of the first rows seen of each group."""
    first: Tensor
    """Σ (x − centre)."""
    second: Tensor
    """Σ (x − centre)²."""

    @classmethod
    def zeros(cls, d_model: int, device: torch.device) -> "_Sums":
        shape = (len(GROUPS), d_model)
        wide = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        return cls(torch.zeros(shape, device=device), *wide)

    def add(self, y_ND: Tensor, piece: "_Piece", scratch_ND: Tensor) -> None:
        """Add rows that are centred already."""
        piece.accumulate(self.first, y_ND)
        piece.accumulate(self.second, torch.square(y_ND, out=scratch_ND))

    def mean_and_m2(self, count_G1: Tensor) -> tuple[Tensor, Tensor]:
        """(G, D) mean, and sum of squares about it."""
        offset_GD = self.first / count_G1
        m2_GD = self.second - self.first * offset_GD
        return self.centre + offset_GD, m2_GD.clamp_(min=0)


@dataclass
class _Layer:
    """Everything that is summed of one layer."""

    x: _Sums
    u: _Sums
    norm: Tensor
    max_abs: Tensor
    cross: Tensor
    """Σ ⟨x − centre, the same of the layer above⟩."""

    @classmethod
    def zeros(cls, d_model: int, device: torch.device) -> "_Layer":
        narrow = (torch.zeros(len(GROUPS), dtype=torch.float64, device=device) for _ in range(3))
        return cls(_Sums.zeros(d_model, device), _Sums.zeros(d_model, device), *narrow)


@dataclass
class _Piece:
    """Some rows of a batch, of one group or of several."""

    rows: Tensor
    """(N,) int64 indices into the batch."""
    groups: list[int]
    """(P,) the groups that occur."""
    new: list[int]
    """Those of them that no row was of before."""
    local: Tensor
    """Index into `groups` of each row."""
    indicator: Tensor
    """float32, 1 where a row is of a group."""
    _on: dict[torch.device, "_Piece"] = field(default_factory=dict)

    def on(self, device: torch.device) -> "_Piece":
        """The same on another device."""
        if device not in self._on:
            self._on[device] = _Piece(
                self.rows.to(device),
                self.groups,
                self.new,
                self.local.to(device),
                self.indicator.to(device),
            )
        return self._on[device]

    def accumulate(self, sums_G: Tensor, values: Tensor) -> None:
        """Add the sums of (N, columns) to (G, columns), or of (N,) to (G,)."""
        if len(self.groups) == 1:
            sums_G[self.groups[0]] += values.sum(dim=0)
        else:
            sums_G[self.groups] += (self.indicator @ values).double()

    def largest(self, max_abs_G: Tensor, values_ND: Tensor) -> Tensor:
        """Raise (G,) to the largest magnitude of each group; the largest of all."""
        if len(self.groups) == 1:
            low, high = torch.aminmax(values_ND)
            magnitude = torch.maximum(high, -low)
            group = self.groups[0]
            max_abs_G[group] = torch.maximum(max_abs_G[group], magnitude.double())
            return magnitude
        magnitude_N = values_ND.abs().amax(dim=1)
        index_N = torch.tensor(self.groups, device=values_ND.device)[self.local]
        max_abs_G.scatter_reduce_(0, index_N, magnitude_N.double(), "amax")
        return magnitude_N.max()

    def centre(self, sums: _Sums, values_ND: Tensor) -> Tensor:
        """(1, D) or (N, D): the centre of each row's group, found where a group is new."""
        if self.new:
            mean_PD = self.indicator @ values_ND / self.indicator.sum(dim=1, keepdim=True)
            places = [self.groups.index(group) for group in self.new]
            sums.centre[self.new] = mean_PD[places]
        if len(self.groups) == 1:
            return sums.centre[self.groups[0]][None]
        return sums.centre[self.groups][self.local]


class DeviceMoments:
    """Moments by group of every site and layer, of the rows added since the last `take`."""

    def __init__(
        self, codecs: Codecs, sites: Sequence[str], layers: Sequence[int], d_model: int
    ) -> None:
        self._codecs = codecs
        self._sites, self._layers, self._d_model = tuple(sites), tuple(layers), d_model
        self._clear()

        self._tables: dict[torch.device, Tensor] = {}

    def _clear(self) -> None:
        self._count_G = np.zeros(len(GROUPS), np.int64)
        self._sums: dict[Key, _Layer] = {}

    def add(self, group_N: npt.NDArray[np.int8], stored: Mapping[Key, Parts]) -> dict[Key, Tensor]:
        """Add a batch.

        Args:
            group_N: index into `GROUPS` of each row.
            stored: (site, layer) → rows as they will be stored, on any device.

        Returns:
            For each key the largest magnitude, a scalar on its device; not finite where a value
            is not.
        """
        kind = next(iter(stored.values()))[0].device.type
        largest: dict[Key, Tensor] = {}
        for piece in self._pieces(group_N, PIECE_VALUES.get(kind, PIECE_VALUES["cpu"])):
            for site in self._sites:
                below: tuple[_Layer, Tensor] | None = None
                for layer in self._layers:
                    key = (site, layer)
                    below, magnitude = self._add_piece(piece, key, stored[key], below)
                    before = largest.get(key)
                    largest[key] = magnitude if before is None else torch.maximum(before, magnitude)
        return largest

    def take(self) -> dict[str, GroupMoments]:
        """The moments so far, on the host; the next batch begins anew."""
        count_G = torch.from_numpy(np.maximum(self._count_G, 1)).double()
        result = {}
        for site in self._sites:
            found: dict[str, list[Tensor]] = {}
            offsets: list[Tensor] = []
            for layer in self._layers:
                sums = self._sums[site, layer]
                count_G1 = count_G[:, None].to(sums.norm.device)
                mean, m2 = sums.x.mean_and_m2(count_G1)
                u_mean, u_m2 = sums.u.mean_and_m2(count_G1)
                offsets.append(sums.x.first.cpu())
                for name, values in {
                    "mean": mean, "m2": m2, "u_mean": u_mean, "u_m2": u_m2,
                    "norm_sum": sums.norm, "max_abs": sums.max_abs,
                    "adjacent_cross": sums.cross,
                }.items():  # fmt: skip
                    found.setdefault(name, []).append(values.cpu())
            cross = found["adjacent_cross"][:-1]
            found["adjacent_cross"] = [
                product_G - (low_GD * high_GD).sum(dim=1) / count_G
                for product_G, low_GD, high_GD in zip(cross, offsets, offsets[1:], strict=False)
            ]
            arrays = {
                name: torch.stack(values).numpy() if values else np.zeros((0, len(GROUPS)))
                for name, values in found.items()
            }
            result[site] = GroupMoments.from_arrays(
                self._layers, self._d_model, {"count": self._count_G, **arrays}
            )
        self._clear()
        return result

    def _pieces(self, group_N: npt.NDArray[np.int8], most_values: int) -> Iterator[_Piece]:
        """The group with the most rows by itself, the others together, in pieces that fit."""
        block_G = np.bincount(group_N, minlength=len(GROUPS))
        most_rows = max(1, most_values // self._d_model)
        largest = block_G.argmax()
        for chosen in (group_N == largest, group_N != largest):
            of_part = np.flatnonzero(chosen)
            for start in range(0, len(of_part), most_rows):
                rows = of_part[start : start + most_rows]
                groups, local_N = np.unique(group_N[rows], return_inverse=True)
                local = torch.from_numpy(local_N.astype(np.int64))
                indicator_PN = torch.nn.functional.one_hot(local, len(groups)).T.float()
                yield _Piece(
                    torch.from_numpy(rows),
                    groups.tolist(),
                    [group for group in groups.tolist() if self._count_G[group] == 0],
                    local,
                    indicator_PN.contiguous(),
                )
                self._count_G += np.bincount(group_N[rows], minlength=len(GROUPS))

    def _add_piece(
        self, piece: _Piece, key: Key, stored: Parts, below: tuple[_Layer, Tensor] | None
    ) -> tuple[tuple[_Layer, Tensor], Tensor]:
        """One layer of a piece; its centred rows for the layer above, and its largest magnitude."""
        device = stored[0].device
        piece = piece.on(device)
        if key not in self._sums:
            self._sums[key] = _Layer.zeros(self._d_model, device)
        sums = self._sums[key]
        num_rows = len(piece.rows)
        x_ND, scratch_ND, *centred_2ND = self._tables_on(device, num_rows)
        place = self._layers.index(key[1])
        y_ND = centred_2ND[place % 2]
        if num_rows < len(stored[0]):
            stored = tuple(part[piece.rows] for part in stored)
        self._codecs[key].decode_into(stored, x_ND)
        torch.sub(x_ND, piece.centre(sums.x, x_ND), out=y_ND)
        if below is not None:
            beneath, y_below_ND = below
            products_ND = torch.mul(y_below_ND.to(y_ND.device), y_ND, out=scratch_ND)
            products_N = products_ND.sum(dim=1).to(y_below_ND.device)
            piece.on(y_below_ND.device).accumulate(beneath.cross, products_N)
        sums.x.add(y_ND, piece, scratch_ND)
        magnitude = piece.largest(sums.max_abs, x_ND)
        piece.accumulate(sums.norm, torch.linalg.vector_norm(x_ND, dim=1))
        _standardize(x_ND)
        x_ND.sub_(piece.centre(sums.u, x_ND))
        sums.u.add(x_ND, piece, scratch_ND)
        return (sums, y_ND), magnitude

    def _tables_on(self, device: torch.device, num_rows: int) -> Tensor:
        """(4, N, D) float32 to be written over: fresh memory would cost as much as the sums."""
        if device not in self._tables or self._tables[device].shape[1] < num_rows:
            self._tables[device] = torch.empty(4, num_rows, self._d_model, device=device)
        return self._tables[device][:, :num_rows]


def _standardize(x_ND: Tensor) -> None:
    """Rows about their mean over their unbiased standard deviation, in place."""
    num_channels = x_ND.shape[1]
    x_ND.sub_(x_ND.mean(dim=1, keepdim=True))
    std_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True)
    std_N1 /= max(num_channels - 1, 1) ** 0.5
    x_ND.mul_((std_N1 + STANDARDIZE_EPS).reciprocal())
