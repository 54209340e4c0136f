"""The walk over a store's rows: each is read and encoded once, beside its token's other layers.

Shapes: N rows in a batch, E eligible ones, D = d_model, K active slots a row.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.analyze.events.encode import encode_rows, write_events
from mlsae.analyze.events.plan import EventsPlan
from mlsae.analyze.events.writer import EventsWriter
from mlsae.analyze.examples.collect import Examples
from mlsae.analyze.measure.bootstrap import count_groups, group_of
from mlsae.analyze.measure.rows.joint import Joint, JointResult
from mlsae.analyze.measure.rows.sums import (
    CosineSum,
    GroupedRows,
    LatentSums,
    PrefixSums,
    RowSums,
    centred,
)
from mlsae.analyze.pairing import Pairing
from mlsae.analyze.results.records import PartRecord
from mlsae.analyze.selection import Int, Single

Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSums:
    """Sums over the evaluated rows at a layer, by group of sequences."""

    eligible: RowSums
    """Unflagged rows at positions ≥ the SAE's `skip_positions`."""

    position_0_in: RowSums
    """Unflagged rows at every position."""

    position_0_out: RowSums
    """Unflagged rows at positions ≥ 1."""

    latents: LatentSums
    """Latents active at the eligible rows."""

    prefixes: npt.NDArray[np.float64]
    """(2, G) over the eligible rows, Σ‖x − x̂‖² by each prefix of latents, and active latents."""

    adjacent_cosine: float | None
    """Mean over the eligible rows of the cosine with the next layer of the store, each about the
    mean of the store's eligible rows; None if the SAE does not read that layer."""

    events: tuple[PartRecord, ...]
    """Parts written to the table `events`."""


@torch.no_grad()
def walk(
    pairing: Pairing,
    sequences: Int,
    *,
    batch_rows: int,
    events: EventsPlan,
    directory: Path,
    joint: Joint,
    examples: Examples | None,
    progress: Callable[[int], object],
) -> tuple[dict[int, LayerSums], JointResult]:
    """Add up every unflagged row of `sequences` at every layer, in memory that does not grow.

    Memory: for each layer, a chunk, a batch's latents, the sums, and a part's events.

    Args:
        pairing: store and SAE.
        sequences: sorted indices.
        batch_rows: rows per layer encoded at once.
        events: plan of the events to write; the plan's rows come first.
        directory: existing folder for the events.
        joint: given every batch.
        examples: given every batch's eligible rows; None for none.
        progress: told the number of rows, over all layers, in each finished batch.

    Returns:
        Sums by layer id, and those over all layers.
    """
    with ExitStack() as stack:
        layers = [
            _Layer(
                pairing,
                layer,
                sequences,
                events.read(layer, sequences, batch_rows),
                stack.enter_context(EventsWriter(directory, events, layer)),
            )
            for layer in pairing.layers
        ]
        for rows, tokens, eligible, latents in _batches(layers, events.end_row):
            joint.add(tokens, eligible, latents)
            if examples is not None and eligible.any():
                examples.add(rows[eligible], tokens[eligible], latents)
            progress(len(rows) * len(layers))
    if examples is not None:
        examples.finish()
    return {of.layer: of.sums() for of in layers}, joint.finish()


def _batches(
    layers: list["_Layer"], end_row: int
) -> Iterator[tuple[Int, Int, Bool, dict[int, tuple[Tensor, Tensor]]]]:
    """Rows (N,), their tokens, whether each is eligible, and layer → the eligible ones' latents."""
    while True:
        latents = {}
        before: _Layer | None = None
        # Flags and chunks belong to rows, whatever the layer: every reader gives the same rows.
        for of in layers:
            if (batch := of.add_next(end_row)) is None:
                return
            rows, tokens, eligible, latents[of.layer] = batch
            if before is not None:
                before.compare(of)
            before = of
        yield rows, tokens, eligible, latents


class _Layer:
    """Sums and events at one layer.

    Args:
        pairing: store and SAE.
        layer: a layer id.
        sequences: sorted indices of all that will be added.
        reader: batches of rows, their tokens, and activations.
        writer: the events' writer.
    """

    def __init__(
        self,
        pairing: Pairing,
        layer: int,
        sequences: Int,
        reader: Iterator[tuple[Int, Int, Single]],
        writer: EventsWriter,
    ) -> None:
        self.layer = layer
        self._pairing, self._sequences = pairing, sequences
        self._reader, self._writer = reader, writer
        # Disjoint sets of rows: position 0, skipped after it, the rest. Every filter that is
        # reported is a union of them.
        self._num_groups = count_groups(len(sequences))
        moments = pairing.store.moments(pairing.site, pairing.skip_positions)
        place = moments.layers.index(layer)
        mean = moments.mean[place]
        self._rows = GroupedRows(3 * self._num_groups, mean, pairing.device)
        self._mean = torch.from_numpy(mean).to(pairing.device)
        self._centred = torch.zeros(0, len(mean), dtype=torch.float64, device=pairing.device)
        self._next = moments.layers[place + 1 : place + 2]
        self._cosines = CosineSum(pairing.device)
        self._latents = LatentSums(pairing.sae.config.num_latents, pairing.device)
        self._prefixes = PrefixSums(pairing.sae.config.prefixes, pairing.device)

    def add_next(self, end_row: int) -> tuple[Int, Int, Bool, tuple[Tensor, Tensor]] | None:
        """Encode the next batch and add it up; write the events of its rows before `end_row`.

        Returns:
            Rows (N,), their tokens, whether each is eligible, and (E, K) values and indices of the
            eligible ones' latents; None when there are no more.
        """
        if (batch := next(self._reader, None)) is None:
            return None
        found = encode_rows(self._pairing, self.layer, batch)
        x_hats = self._pairing.sae.decode_prefixes(found.encoded)
        sequences_N, positions = np.divmod(found.tokens, self._pairing.store.context_length)
        places = np.searchsorted(self._sequences, sequences_N)
        part = np.where(positions == 0, 0, np.where(found.eligible, 2, 1))
        groups = group_of(places, len(self._sequences))
        keys = torch.from_numpy(part * self._num_groups + groups)
        self._rows.add(keys.to(self._pairing.device), found.x, x_hats[:, -1], found.encoded.values)
        self._latents.add(*found.latents)
        eligible = torch.from_numpy(found.eligible).to(self._pairing.device)
        self._prefixes.add(found.x[eligible], x_hats[eligible], *found.latents)
        self._centred = centred(found.x[eligible], self._mean)
        write_events(self._writer, found, end_row)
        return found.rows, found.tokens, found.eligible, found.latents

    def compare(self, following: "_Layer") -> None:
        """Add the cosines of the batch in hand with the SAE's next layer, if it is the store's."""
        if following.layer in self._next:
            self._cosines.add(self._centred, following._centred)

    def sums(self) -> LayerSums:
        """All sums, once the writer has been closed."""
        first, skipped, rest = (
            self._rows.sums(n * self._num_groups, (n + 1) * self._num_groups) for n in range(3)
        )
        later = skipped + rest
        return LayerSums(
            eligible=first + later if self._pairing.skip_positions == 0 else rest,
            position_0_in=first + later,
            position_0_out=later,
            latents=self._latents,
            prefixes=self._prefixes.sums.cpu().numpy(),
            adjacent_cosine=self._cosines.mean(),
            events=tuple(self._writer.records),
        )
