"""Cost of a shard's encoding, measured where the transformer computed the rows.

`mlsae.store.format.added_fvu` defines the number: over the eligible rows, in total and by decile of
norm. Rows are summed in float32, each about the mean of the shard's first ones, so that nothing
cancels, and pieces of rows in float64: a number is right to a relative 1e-5. Rows that differ by no
more than float32 rounds have no variance here.

Shape suffixes: N rows, D channels, Q deciles.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.base.words import Key
from mlsae.harvest.compute.codecs import Codec, Codecs, StoredTensors, piece_rows
from mlsae.store.format.added_fvu import NUM_DECILES, added_fvu
from mlsae.store.format.moments import eligible_groups

ROUNDING = 1e-6
"""Share of a sum of squares about the centre that is taken for float32's rounding."""
NOISE = 1e-12
"""Share of a sum of squares that a transformer in float32 leaves of rows that are all alike: 1e-6
of their norm."""


@dataclass
class _Sums:
    """Sums for one site and layer, on one device; float64 but for the centre."""

    edges: Tensor
    """Norms that part the first rows' deciles, ascending."""
    centre: Tensor
    """(D,) float32; mean over the first rows."""
    scalars: Tensor
    """(Q, 4) rows, Σ‖x − decoded‖², Σ‖x − centre‖², Σ‖x‖²."""
    first: Tensor
    """(Q, D) Σ (x − centre)."""


class RunningFVU:
    """Added FVU at every site and layer, over the rows added since the last `take`.

    Args:
        codecs: codec for each site and layer.
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
        stored: Mapping[Key, StoredTensors],
    ) -> None:
        """Add a batch, unless the encoding changes nothing or the first batches tell its cost.

        Args:
            group_N: each row's index into `mlsae.store.format.moments.GROUPS`.
            rows: (site, layer) → (N, D) floats before encoding, on any device.
            stored: the stored values for `rows`.
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
                if key not in self._sums:
                    self._sums[key] = self._begin(x_ND, eligible_here_N)
                for some in self._pieces(x_ND):
                    parts = tuple(part[some] for part in stored[key])
                    self._add(self._sums[key], codec, x_ND[some], parts, eligible_here_N[some])

    def take(self) -> dict[str, dict[str, Any]] | None:
        """Site → layer (decimal) → the mapping that `added_fvu` gives; the next batch begins anew.

        None where nothing was measured.
        """
        result: dict[str, dict[str, Any]] = {}
        for (site, layer), sums in self._sums.items():
            result.setdefault(site, {})[str(layer)] = _result(sums)
        self._sums = {}
        self._has_begun = False
        return result or None

    def _begin(self, x_ND: Tensor, eligible_N: Tensor) -> _Sums:
        wide: dict[str, Any] = {"dtype": torch.float64, "device": x_ND.device}
        total_D = torch.zeros(self._d_model, **wide)
        norm_N = torch.empty(len(x_ND), **wide)
        for some in self._pieces(x_ND):
            (piece_ND,) = self._tables_on(x_ND.device, len(x_ND[some]))[:1]
            piece_ND.copy_(x_ND[some])
            norm_N[some] = torch.linalg.vector_norm(piece_ND, dim=1).double()
            total_D += eligible_N[some].float() @ piece_ND
        parts = torch.arange(1, NUM_DECILES, **wide) / NUM_DECILES
        return _Sums(
            edges=torch.quantile(norm_N[eligible_N], parts),
            centre=(total_D / eligible_N.sum()).float(),
            scalars=torch.zeros(NUM_DECILES, 4, **wide),
            first=torch.zeros(NUM_DECILES, self._d_model, **wide),
        )

    def _add(
        self, sums: _Sums, codec: Codec, rows_ND: Tensor, stored: StoredTensors, eligible_N: Tensor
    ) -> None:
        x_ND, decoded_ND = self._tables_on(rows_ND.device, len(rows_ND))
        x_ND.copy_(rows_ND)
        codec.decode_into(stored, decoded_ND)
        error_N = _squares(torch.sub(x_ND, decoded_ND, out=decoded_ND))
        norm_N = torch.linalg.vector_norm(x_ND, dim=1).double()
        decile_N = torch.bucketize(norm_N, sums.edges, right=True)
        # Ineligible rows are in no decile: taking the others out would copy them.
        decile_N.masked_fill_(~eligible_N, NUM_DECILES)
        is_in_QN = decile_N == torch.arange(NUM_DECILES, device=decile_N.device)[:, None]
        x_ND.sub_(sums.centre)
        scalars = [torch.ones_like(norm_N), error_N, _squares(x_ND), norm_N.square()]
        sums.scalars += is_in_QN.double() @ torch.stack(scalars, dim=1)
        sums.first += is_in_QN.float() @ x_ND

    def _pieces(self, x_ND: Tensor) -> Iterator[slice]:
        most_rows = piece_rows(x_ND.device, self._d_model)
        for start in range(0, len(x_ND), most_rows):
            yield slice(start, start + most_rows)

    def _tables_on(self, device: torch.device, num_rows: int) -> Tensor:
        """(2, N, D) float32 to be written over."""
        if device not in self._tables or self._tables[device].shape[1] < num_rows:
            self._tables[device] = torch.empty(2, num_rows, self._d_model, device=device)
        return self._tables[device][:, :num_rows]


def _result(sums: _Sums) -> dict[str, Any]:
    """Added FVU from sums in float32, whose rounding is no variance."""
    count_Q, error_Q, square_Q, power_Q = sums.scalars.cpu().numpy().T
    first_QD = sums.first.cpu().numpy()
    # Where a decile's rows are all alike, their distance from the centre alone.
    alike_Q = np.square(first_QD).sum(axis=1) / np.maximum(count_Q, 1)
    without_Q = np.where(_is_noise(square_Q, alike_Q, power_Q), alike_Q, square_Q)
    alike = np.square(first_QD.sum(axis=0)).sum() / max(count_Q.sum(), 1)
    if _is_noise(square_Q.sum(), alike, power_Q.sum()):
        without_Q, first_QD = np.zeros_like(without_Q), np.zeros_like(first_QD)
    return added_fvu(count_Q, error_Q, without_Q, first_QD)


def _is_noise(square: Any, alike: Any, power: Any) -> Any:
    return square - alike < ROUNDING * square + NOISE * power


def _squares(x_ND: Tensor) -> Tensor:
    """(N,) float64 row sums of squares."""
    norm_N: Tensor = torch.linalg.vector_norm(x_ND, dim=1)
    return norm_N.double().square_()
