"""One pass over a store's rows: encode, reconstruct, add up."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mlsae.analyze.events.plan import EventsPlan
from mlsae.analyze.events.writer import EventsWriter
from mlsae.analyze.measure.bootstrap import count_groups, group_of
from mlsae.analyze.measure.rows.sums import GroupedRows, LatentSums, RowSums
from mlsae.analyze.pairing import Pairing
from mlsae.analyze.results.parts import PartRecord
from mlsae.analyze.selection import Int


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSums:
    """What the evaluated rows of a layer add up to, by group of sequences."""

    eligible: RowSums
    """Unflagged rows at positions ≥ the SAE's `skip_positions`."""

    position_0_in: RowSums
    """Unflagged rows at every position."""

    position_0_out: RowSums
    """Unflagged rows at positions ≥ 1."""

    latents: LatentSums
    """Of the eligible rows."""

    events: tuple[PartRecord, ...]
    """The parts of the table `events` that were written."""


@torch.no_grad()
def sweep_layer(
    pairing: Pairing,
    layer: int,
    sequences: Int,
    *,
    batch_rows: int,
    events: EventsPlan,
    directory: Path,
    progress: Callable[[int], object],
) -> LayerSums:
    """Add up every unflagged row of `sequences` at a layer, in memory that does not grow.

    Args:
        pairing: store and SAE.
        layer: a layer id.
        sequences: sorted indices.
        batch_rows: rows encoded at once.
        events: what is written of the latents as they are read back; its rows come first.
        directory: existing folder for the events.
        progress: told the number of rows of each finished batch.
    """
    store, sae, device = pairing.store, pairing.sae, pairing.device
    # Disjoint sets of rows: position 0, skipped after it, the rest. Every filter that is reported
    # is a union of them.
    num_groups = count_groups(len(sequences))
    moments = store.moments(pairing.site, pairing.skip_positions)
    grouped = GroupedRows(3 * num_groups, moments.mean[moments.layers.index(layer)], device)
    latents = LatentSums(sae.config.num_latents, device)
    with EventsWriter(directory, events, layer) as writer:
        for rows, tokens, stored in events.read(layer, sequences, batch_rows):
            x = torch.from_numpy(stored).to(device)
            encoded = sae.encode(x, layer)
            x_hat = sae.decode(encoded)
            positions = tokens % store.context_length
            is_eligible = positions >= pairing.skip_positions
            places = np.searchsorted(sequences, tokens // store.context_length)
            part = np.where(positions == 0, 0, np.where(is_eligible, 2, 1))
            keys = torch.from_numpy(part * num_groups + group_of(places, len(sequences)))
            grouped.add(keys.to(device), x, x_hat, encoded.values)
            eligible = torch.from_numpy(is_eligible).to(device)
            values, indices = encoded.values[eligible], encoded.indices[eligible]
            latents.add(values, indices)
            # Rows ascend, so those that the events cover come first.
            covered = int((rows[is_eligible] < events.end_row).sum())
            writer.append(
                rows[is_eligible][:covered],
                tokens[is_eligible][:covered],
                values[:covered].cpu().numpy(),
                indices[:covered].cpu().numpy(),
            )
            progress(len(rows))
    first, skipped, rest = (grouped.sums(n * num_groups, (n + 1) * num_groups) for n in range(3))
    later = skipped + rest
    eligible_rows = first + later if pairing.skip_positions == 0 else rest
    return LayerSums(
        eligible=eligible_rows,
        position_0_in=first + later,
        position_0_out=later,
        latents=latents,
        events=tuple(writer.records),
    )
