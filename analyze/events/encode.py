"""A batch's rows encoded by an SAE, and the eligible ones' events.

Shapes: N rows in a batch, E eligible ones, D = d_model, K slots a row.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.analyze.events.part import PartWriter
from mlsae.analyze.events.writer import EventsWriter
from mlsae.analyze.pairing import Pairing
from mlsae.analyze.selection import Int, Single
from mlsae.sae import Latents


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRows:
    """Rows at one layer, with their latents on the SAE's device."""

    rows: Int
    """(N,) row numbers, ascending."""

    tokens: Int
    """(N,) each row's token index."""

    eligible: npt.NDArray[np.bool_]
    """(N,) True where the position is at least the SAE's `skip_positions`."""

    x: Tensor
    """(N, D) activations."""

    encoded: Latents
    """Latents at all rows."""

    latents: tuple[Tensor, Tensor]
    """(E, K) values and (E, K) indices at the eligible rows."""


def encode_rows(pairing: Pairing, layer: int, batch: tuple[Int, Int, Single]) -> EncodedRows:
    """Encode a batch from `read_rows`, with no gradient wanted.

    Args:
        pairing: store and SAE.
        layer: layer id of the rows.
        batch: row numbers (N,), each one's token index (N,) and activations (N, D).
    """
    rows_N, tokens_N, stored_ND = batch
    x_ND = torch.from_numpy(stored_ND).to(pairing.device)
    encoded = pairing.sae.encode(x_ND, layer)
    eligible_N = tokens_N % pairing.store.context_length >= pairing.skip_positions
    eligible = torch.from_numpy(eligible_N).to(pairing.device)
    return EncodedRows(
        rows=rows_N,
        tokens=tokens_N,
        eligible=eligible_N,
        x=x_ND,
        encoded=encoded,
        latents=(encoded.values[eligible], encoded.indices[eligible]),
    )


def write_events(writer: PartWriter | EventsWriter, batch: EncodedRows, end_row: int) -> None:
    """Write the eligible rows' events before `end_row`.

    Raises:
        ResourceError: the disk is full.
    """
    rows, tokens = batch.rows[batch.eligible], batch.tokens[batch.eligible]
    covered = int(np.searchsorted(rows, end_row))
    values, indices = batch.latents
    writer.append(
        rows[:covered],
        tokens[:covered],
        values[:covered].cpu().numpy(),
        indices[:covered].cpu().numpy(),
    )
