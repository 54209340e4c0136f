"""Sums over a shard's rows, all layers of some rows in one group at a time.

The sums that `mlsae.store.format.accumulate` makes on the host, for rows on any device.
Rows are summed about a centre near their mean, kept for a whole shard, so that nothing cancels:
in float32 within a piece, in float64 between pieces.

Shape suffixes: L layers, N rows in a piece, D channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlsae.base.words import Key
from mlsae.harvest.compute.codecs import Codecs, StoredTensors
from mlsae.store.format.moments import STANDARDIZE_EPS, Floats, GroupMoments


@dataclass
class Sums:
    """Sums over one group of rows, for a run's layers; u is the standardised row."""

    centre: Tensor
    """(2, L, 1, D) float32; mean x and mean u over the first rows."""
    columns: Tensor
    """(4, L, D) float64; Σ (x − centre) and Σ (x − centre)², then the same of u."""
    norm: Tensor
    """(L,) float64 Σ ‖x‖₂."""
    cross: Tensor
    """(L,) float64 Σ ⟨x − centre, the same one layer below⟩; 0 for the lowest layer of all."""
    max_abs: Tensor
    """(L,) float32."""
    count: int = 0

    @classmethod
    def zeros(cls, num_layers: int, d_model: int, device: torch.device) -> "Sums":
        """Sums over no rows."""
        wide = torch.float64
        return cls(
            torch.zeros(2, num_layers, 1, d_model, device=device),
            torch.zeros(4, num_layers, d_model, dtype=wide, device=device),
            torch.zeros(num_layers, dtype=wide, device=device),
            torch.zeros(num_layers, dtype=wide, device=device),
            torch.zeros(num_layers, device=device),
        )


class Tables:
    """Memory to be written over: fresh memory would cost as much as the sums."""

    def __init__(self, num_layers: int, d_model: int, device: torch.device) -> None:
        self._num_layers, self._d_model, self.device = num_layers, d_model, device
        self._values = torch.empty(3, 0, device=device)
        self.columns_4LD = torch.empty(4, num_layers, d_model, device=device)
        self._column_LD = self.columns_4LD.unbind()

    def rows(self, num_rows: int) -> Tensor:
        """(3, L, N, D) float32."""
        size = self._num_layers * num_rows * self._d_model
        if self._values.shape[1] < size:
            self._values = torch.empty(3, size, device=self.device)
        return self._values[:, :size].view(3, self._num_layers, num_rows, self._d_model)

    def sum_columns(self, place: int, y_LND: Tensor, scratch_LND: Tensor) -> None:
        """Sums over the rows of y and y², to two columns."""
        torch.sum(y_LND, dim=1, out=self._column_LD[place])
        torch.square(y_LND, out=scratch_LND)
        torch.sum(scratch_LND, dim=1, out=self._column_LD[place + 1])


class Run:
    """A site's neighbouring layers whose rows are on one device."""

    def __init__(
        self,
        keys: Sequence[Key],
        codecs: Codecs,
        d_model: int,
        tables: Tables,
        *,
        is_lowest: bool,
    ) -> None:
        self.keys, self._d_model, self._tables = tuple(keys), d_model, tables
        self._is_lowest = is_lowest
        self._codecs = [codecs[key] for key in keys]
        self.sums: dict[int, Sums] = {}
        """Sums by group."""
        self.clear_largest()

    def clear_largest(self) -> None:
        """Begin a batch."""
        self.largest_L = torch.zeros(len(self.keys), device=self._tables.device)
        """Largest magnitudes in the batch."""

    def add(
        self,
        group: int,
        stored: Mapping[Key, StoredTensors],
        picked: Callable[[Tensor], Tensor],
        num_rows: int,
        below_ND: Tensor | None,
    ) -> Tensor:
        """Add a piece of a batch.

        Args:
            group: the rows' index into `mlsae.store.format.moments.GROUPS`.
            stored: the batch.
            picked: takes the rows out of it.
            num_rows: N.
            below_ND: centred rows that the run before returned; unused in a site's lowest run.

        Returns:
            (N, D) centred rows at the highest layer.
        """
        if group not in self.sums:
            self.sums[group] = Sums.zeros(len(self.keys), self._d_model, self._tables.device)
        sums = self.sums[group]
        x_LND, y_LND, scratch_LND = self._tables.rows(num_rows)
        for key, codec, x_ND in zip(self.keys, self._codecs, x_LND, strict=True):
            codec.decode_into(tuple(map(picked, stored[key])), x_ND)
        magnitude_L = torch.maximum(x_LND.amax(dim=(1, 2)), -x_LND.amin(dim=(1, 2)))
        torch.maximum(self.largest_L, magnitude_L, out=self.largest_L)
        torch.maximum(sums.max_abs, magnitude_L, out=sums.max_abs)
        is_first = not sums.count
        sums.count += num_rows
        centre_L1D, u_centre_L1D = sums.centre
        if is_first:
            torch.mean(x_LND, dim=1, keepdim=True, out=centre_L1D)
        torch.sub(x_LND, centre_L1D, out=y_LND)
        torch.mul(y_LND[:-1], y_LND[1:], out=scratch_LND[1:])
        sums.cross[1:] += scratch_LND[1:].sum(dim=(1, 2))
        if below_ND is not None and not self._is_lowest:
            sums.cross[0] += (below_ND.to(y_LND.device) * y_LND[0]).sum()
        self._tables.sum_columns(0, y_LND, scratch_LND)
        # u, where x was.
        mean_LN1 = x_LND.mean(dim=2, keepdim=True)
        x_LND.sub_(mean_LN1)
        deviation_LN1 = torch.linalg.vector_norm(x_LND, dim=2, keepdim=True)
        sums.norm += torch.hypot(deviation_LN1, mean_LN1 * self._d_model**0.5).sum(dim=(1, 2))
        std_LN1 = deviation_LN1 / max(self._d_model - 1, 1) ** 0.5
        scale_LN1 = (std_LN1 + STANDARDIZE_EPS).reciprocal()
        if is_first:
            torch.mul(x_LND, scale_LN1, out=scratch_LND)
            torch.mean(scratch_LND, dim=1, keepdim=True, out=u_centre_L1D)
        torch.addcmul(-u_centre_L1D, x_LND, scale_LN1, out=x_LND)
        self._tables.sum_columns(2, x_LND, scratch_LND)
        sums.columns += self._tables.columns_4LD
        highest_ND: Tensor = y_LND[-1]
        return highest_ND


def merge_runs(runs: Sequence[Run], moments: GroupMoments) -> None:
    """Merge a site's sums, its runs from the lowest up, into moments; the runs begin anew."""
    for group in runs[0].sums:
        sums = [run.sums[group] for run in runs]
        columns_4LD = _on_host([of_run.columns for of_run in sums], 1)
        moments.merge_sums(
            group,
            sums[0].count,
            centre_2LD=_on_host([of_run.centre[:, :, 0] for of_run in sums], 1),
            first_2LD=columns_4LD[::2],
            second_2LD=columns_4LD[1::2],
            norm_sum_L=_on_host([of_run.norm for of_run in sums], 0),
            max_abs_L=_on_host([of_run.max_abs for of_run in sums], 0),
            cross_L=_on_host([of_run.cross for of_run in sums], 0)[1:],
        )
    for run in runs:
        run.sums = {}


def _on_host(parts: Sequence[Tensor], dim: int) -> Floats:
    values: Floats = torch.cat([part.cpu() for part in parts], dim).numpy()
    return values
