"""The parts of the table `events`: rows that it covers, cut into files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from mlsae.analyze.events.part import BYTES_PER_EVENT, PartWriter
from mlsae.analyze.pairing import Pairing
from mlsae.analyze.results.tables import schema
from mlsae.analyze.selection import Int, Single, read_rows

MOST_A_ROW = 512
"""Latents a row, at most, that an SAE is taken to use where a row may use any number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedPart:
    """A run of sequences at one layer, to be written as one file."""

    layer: int
    """A layer id."""

    sequences: Int
    """Sorted indices of whole sequences."""

    path: str
    """Path within the data set's folder."""

    num_rows: int
    """Rows in the sequences, flagged ones included."""

    end_row: int
    """Row after the part's last one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EventsPlan:
    """A data set's parts, which depend neither on who writes them nor on the place."""

    pairing: Pairing
    """The store and the SAE."""

    runs: tuple[Int, ...]
    """Sorted indices of each part's sequences, equal at every layer; at least one run."""

    part_events: int
    """Events that are sorted and written together."""

    schema: pa.Schema
    """The table's schema, with its provenance."""

    @property
    def parts(self) -> list[PlannedPart]:
        """All parts, run by run and, within a run, layer by layer."""
        return [self.part(layer, run) for run in self.runs for layer in self.pairing.layers]

    def part(self, layer: int, run: Int) -> PlannedPart:
        """The part for a run at a layer."""
        length = self.pairing.store.rows_per_sequence
        first, end = (int(run[0]), int(run[-1]) + 1) if len(run) else (0, 0)
        return PlannedPart(
            layer=layer,
            sequences=run,
            path=f"layer-{layer}/part-{first * length:012d}.parquet",
            num_rows=len(run) * length,
            end_row=end * length,
        )

    @property
    def end_row(self) -> int:
        """Row after the last one that the table covers."""
        return self.part(self.pairing.layers[-1], self.runs[-1]).end_row

    def writer(self, directory: Path, part: PlannedPart, scratch: Path) -> PartWriter:
        """Make a part's folder, and the writer for it."""
        (directory / part.path).parent.mkdir(parents=True, exist_ok=True)
        return PartWriter(
            directory,
            part.path,
            scratch=scratch,
            schema=self.schema,
            layer=part.layer,
            num_latents=self.pairing.sae.config.num_latents,
            part_events=self.part_events,
        )

    def read(
        self, layer: int, sequences: Int, batch_rows: int
    ) -> Iterator[tuple[Int, Int, Single]]:
        """Read rows as `read_rows` does, with no batch across the border between two parts.

        The shape of a batch decides the last bits of encoded values, so a part has the same bytes
        whether it is written alone or with others.

        Args:
            layer: a layer id.
            sequences: sorted indices that begin with those in `runs`.
            batch_rows: most rows in a batch.
        """
        store, site = self.pairing.store, self.pairing.site
        rest = sequences[sum(map(len, self.runs)) :]
        for run in (*self.runs, rest):
            if len(run):
                yield from read_rows(store, site, layer, run, batch_rows)


def plan_events(
    pairing: Pairing, sequences: Int, part_events: int, provenance: Mapping[str, str]
) -> EventsPlan:
    """Cut `sequences` into equally long runs with about `part_events` events at a layer.

    Args:
        pairing: the store and the SAE.
        sequences: sorted indices, perhaps none.
        part_events: events in a part.
        provenance: the inputs' ids, for the schema.
    """
    a_row = min(pairing.sae.expected_active, MOST_A_ROW)
    most = max(1, part_events // (a_row * pairing.store.rows_per_sequence))
    return EventsPlan(
        pairing=pairing,
        runs=tuple(np.array_split(sequences, max(1, -(-len(sequences) // most)))),
        part_events=part_events,
        schema=schema("events", provenance),
    )


@torch.no_grad()
def estimate_bytes(plan: EventsPlan, batch_rows: int) -> dict[str, int]:
    """Estimate each part's largest size, in bytes by path.

    Where the architecture does not bound a row's events, a batch of each layer is counted.
    """
    found: dict[str, int] = {}
    for layer in plan.pairing.layers:
        a_row = _active_a_row(plan, layer, batch_rows)
        parts = (plan.part(layer, run) for run in plan.runs)
        found |= {part.path: round(part.num_rows * a_row * BYTES_PER_EVENT) for part in parts}
    return found


def _active_a_row(plan: EventsPlan, layer: int, batch_rows: int) -> float:
    sae = plan.pairing.sae
    if (most := sae.architecture.most_active) is not None:
        return most
    store, site = plan.pairing.store, plan.pairing.site
    batch = next(read_rows(store, site, layer, plan.runs[0], batch_rows), None)
    if batch is None:
        return 0
    encoded = sae.encode(torch.from_numpy(batch[2]).to(plan.pairing.device), layer)
    return float((encoded.values != 0).sum()) / len(batch[2])
