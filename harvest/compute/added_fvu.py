"""What the encoding of a shard costs, measured where the transformer computed its rows.

The figure is that of `mlsae.store.format.added_fvu`: of the eligible rows, in total and by decile
of norm.
Rows are summed in float32, each about the mean of the shard's first ones, so that nothing cancels,
and pieces of rows in float64: a figure is right to a relative 1e-5. Rows that differ by no more
than float32 rounds have no variance here.

Shape suffixes: N rows, D channels, Q deciles and a last group of rows that are not eligible.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.harvest.compute.codecs import Codec, Codecs, Key, Parts, piece_rows
from mlsae.store.format.added_fvu import NUM_DECILES, AddedFVU
from mlsae.store.format.moments import eligible_groups

ROUNDING = 1e-6
"""Less of a sum of squares about the centre than this is what float32 left over."""
NOISE = 1e-12
"""Less of a sum of squares than this is what a transformer in float32 leaves of rows that are all
alike: 1e-6 of their norm."""


@dataclass
class _Sums:
    """Of one site and layer, on one device; float64 but for the centre."""

    edges: Tensor
    """Norms that part the deciles of the first rows, ascending."""
    centre: Tensor
    """(D,) float32; the mean of the first rows."""
    count: Tensor
    """(Q,)"""
    error: Tensor
    """(Q,) Σ‖x − decoded‖²."""
    power: Tensor
    """(Q,) Σ‖x‖²."""
    square: Tensor
    """(Q,) Σ‖x − centre‖²."""
    first: Tensor
    """(Q, D) Σ (x − centre)."""


class EncodingCost:
    """Added FVU of every site and layer, of the rows added since the last `take`.

    Args:
        codecs: how the rows of each are held.
        d_model: channels.
    """

    def __init__(self, codecs: Codecs, d_model: int) -> None:
        self._codecs, self._d_model = codecs, d_model
        self._tables: dict[torch.device, Tensor] = {}
        self._sums: dict[Key, _Sums] = {}
        self._has_begun = False

    def add(
        self,
        group_N: npt.NDArray[np.int8],
        rows: Mapping[Key, Tensor],
        stored: Mapping[Key, Parts],
    ) -> None:
        """Add a batch; one in which the encoding changes nothing or the first ones tell is passed.

        Args:
            group_N: index into `mlsae.store.format.moments.GROUPS` of each row.
            rows: (site, layer) → (N, D) floats before encoding, on any device.
            stored: the same rows as they will be stored.
        """
        eligible_N = torch.from_numpy(group_N >= eligible_groups(1)[0])
        is_first, self._has_begun = not self._has_begun, True
        if not eligible_N.any():
            return
        on: dict[torch.device, Tensor] = {}
        for key, x_ND in rows.items():
            codec, device = self._codecs[key], x_ND.device
            if x_ND.dtype != codec.parts[0][0] and (is_first or codec.measures_all):
                eligible_here_N = on.setdefault(device, eligible_N.to(device))
                self._add(key, codec, x_ND, stored[key], eligible_here_N)

    def take(self) -> dict[str, dict[str, Any]] | None:
        """Site → layer (decimal) → what `AddedFVU.result` gives; the next batch begins anew.

        None where nothing was measured.
        """
        result: dict[str, dict[str, Any]] = {}
        for (site, layer), sums in self._sums.items():
            result.setdefault(site, {})[str(layer)] = _OnHost(sums).result()
        self._sums = {}
        self._has_begun = False
        return result or None

    def _add(self, key: Key, codec: Codec, x_ND: Tensor, stored: Parts, eligible_N: Tensor) -> None:
        if key not in self._sums:
            self._sums[key] = self._begin(x_ND, eligible_N)
        for piece in self._pieces(x_ND):
            self._add_piece(
                self._sums[key],
                codec,
                x_ND[piece],
                tuple(part[piece] for part in stored),
                eligible_N[piece],
            )

    def _begin(self, x_ND: Tensor, eligible_N: Tensor) -> _Sums:
        wide: dict[str, Any] = {"dtype": torch.float64, "device": x_ND.device}
        total_D = torch.zeros(self._d_model, **wide)
        norm_N = torch.empty(len(x_ND), **wide)
        for piece in self._pieces(x_ND):
            (piece_ND,) = self._tables_on(x_ND.device, len(x_ND[piece]))[:1]
            piece_ND.copy_(x_ND[piece])
            norm_N[piece] = torch.linalg.vector_norm(piece_ND, dim=1).double()
            total_D += eligible_N[piece].float() @ piece_ND
        parts = torch.arange(1, NUM_DECILES, **wide) / NUM_DECILES
        num_groups = NUM_DECILES + 1
        return _Sums(
            edges=torch.quantile(norm_N[eligible_N], parts),
            centre=(total_D / eligible_N.sum()).float(),
            count=torch.zeros(num_groups, **wide),
            error=torch.zeros(num_groups, **wide),
            power=torch.zeros(num_groups, **wide),
            square=torch.zeros(num_groups, **wide),
            first=torch.zeros(num_groups, self._d_model, **wide),
        )

    def _add_piece(
        self, sums: _Sums, codec: Codec, rows_ND: Tensor, stored: Parts, eligible_N: Tensor
    ) -> None:
        x_ND, decoded_ND = self._tables_on(rows_ND.device, len(rows_ND))
        x_ND.copy_(rows_ND)
        codec.decode_into(stored, decoded_ND)
        error_N = _squares(torch.sub(x_ND, decoded_ND, out=decoded_ND))
        norm_N = torch.linalg.vector_norm(x_ND, dim=1).double()
        # Ineligible rows go to a group of their own: taking the others out would copy them.
        decile_N = torch.bucketize(norm_N, sums.edges, right=True)
        decile_N.masked_fill_(~eligible_N, NUM_DECILES)
        x_ND.sub_(sums.centre)
        for sums_Q, values_N in (
            (sums.count, torch.ones_like(norm_N)),
            (sums.error, error_N),
            (sums.power, norm_N.square()),
            (sums.square, _squares(x_ND)),
        ):
            sums_Q.index_add_(0, decile_N, values_N)
        indicator_NQ = torch.nn.functional.one_hot(decile_N, NUM_DECILES + 1).float()
        sums.first += indicator_NQ.T @ x_ND

    def _pieces(self, x_ND: Tensor) -> Iterator[slice]:
        most_rows = piece_rows(x_ND.device, self._d_model)
        for start in range(0, len(x_ND), most_rows):
            yield slice(start, start + most_rows)

    def _tables_on(self, device: torch.device, num_rows: int) -> Tensor:
        """(2, N, D) float32 to be written over."""
        if device not in self._tables or self._tables[device].shape[1] < num_rows:
            self._tables[device] = torch.empty(2, num_rows, self._d_model, device=device)
        return self._tables[device][:, :num_rows]


class _OnHost(AddedFVU):
    """Sums that were made on a device."""

    def __init__(self, sums: _Sums) -> None:
        super().__init__()
        eligible = slice(NUM_DECILES)
        self._count_Q = sums.count[eligible].cpu().numpy().astype(np.int64)
        self._error_Q = sums.error[eligible].cpu().numpy()
        self._sum_QD = sums.first[eligible].cpu().numpy()
        square_Q = sums.square[eligible].cpu().numpy()
        power_Q = sums.power[eligible].cpu().numpy()
        # Of rows that are all alike: their distance from the centre, and no variance.
        alike_Q = np.square(self._sum_QD).sum(axis=1) / np.maximum(self._count_Q, 1)
        is_noise_Q = square_Q - alike_Q < ROUNDING * square_Q + NOISE * power_Q
        self._square_Q = np.where(is_noise_Q, alike_Q, square_Q)
        alike = np.square(self._sum_QD.sum(axis=0)).sum() / max(self._count_Q.sum(), 1)
        if square_Q.sum() - alike < ROUNDING * square_Q.sum() + NOISE * power_Q.sum():
            self._square_Q[:] = 0
            self._sum_QD[:] = 0


def _squares(x_ND: Tensor) -> Tensor:
    """(N,) float64 sums of the squares of a row."""
    norm_N: Tensor = torch.linalg.vector_norm(x_ND, dim=1)
    return norm_N.double().square_()
