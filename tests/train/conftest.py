"""A sampler's order played out on a made-up store: which rows its steps visit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.store import create, open_store
from mlsae.train.sampler import Order, slice_rows

Int64 = npt.NDArray[np.int64]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Shapes here are tiny: more threads would only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def thinned() -> Callable[..., Path]:
    """The same text and values as a sample's, in a store beside it that keeps some positions.

    `thinned(sample, num=7)`: 7 of the positions of each sequence.
    """

    def make(sample: Any, *, num: int, seed: int = 5) -> Path:
        full = open_store(sample.path)
        path = Path(sample.path.with_name(f"{sample.path.name}-{num}"))
        with create(
            path,
            tokens=sample.tokens,
            context_length=full.context_length,
            layers=full.layers,
            d_model=full.d_model,
            documents=sample.documents,
            token_flags=sample.token_flags,
            encoding=full.encoding,
            batch_sequences=full.plan["batch_sequences"],
            keep_positions=num,
            keep_seed=seed,
            shard_bytes=3000,
        ) as writer:
            tokens = writer.row_tokens(0, writer.num_rows)
            writer.append({("resid_post", i): x[tokens] for i, x in sample.activations.items()})
        return path

    return make


@dataclass(frozen=True)
class Played:
    """An order together with the eligible rows behind its counts."""

    order: Order
    slice_rows: int
    eligible: npt.NDArray[np.bool_]

    def steps(self, step: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """One rank's share of every batch, as rows of the store."""
        rows = np.flatnonzero(self.eligible)
        starts = np.cumsum(self.order.counts, dtype=np.int64) - self.order.counts
        shape = (self.order.num_layers, self.order.num_slots, self.slice_rows)
        table, slices = np.full(shape, -1), np.full(shape[:2], -1)
        for found in self.order.walk(step, rank, world_size):
            parts = found.opened
            order = self.order.part_order(parts)
            table[parts.layer, parts.slot] = -1
            table[parts.layer, parts.slot, : order.shape[1]] = order
            slices[parts.layer, parts.slot] = parts.slice
            slice_ = slices[found.layer, found.slot]
            within = table[found.layer, found.slot, found.turn]
            yield Batch(found.layer, rows[starts[slice_] + within], slice_, found.num_rows)


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch."""

    layer: Int64
    row: Int64
    slice: Int64
    num_rows: int

    def items(self) -> set[tuple[int, int]]:
        return set(zip(self.layer.tolist(), self.row.tolist(), strict=True))


@pytest.fixture
def make_played() -> type[Played]:
    """An order whose eligible rows are given."""
    return Played


@pytest.fixture
def play() -> Callable[..., Played]:
    """Make an order over `num_rows` rows of which some are not eligible."""

    def make(
        num_rows: int,
        *,
        num_layers: int = 3,
        batch_rows: int = 96,
        max_rows: int = 8,
        gaps: float = 0.0,
        held_out: float = 0.0,
        context_length: int = 16,
        seed: int = 0,
        epoch: int = 0,
    ) -> Played:
        generator = np.random.default_rng(seed)
        eligible = generator.random(num_rows) >= gaps
        sequences = np.arange(num_rows) // context_length
        out = generator.permutation(sequences[-1] + 1)[: round(held_out * (sequences[-1] + 1))]
        eligible &= ~np.isin(sequences, out)
        size = slice_rows(int(eligible.sum()), batch_rows, num_layers, max_rows)
        counts = np.add.reduceat(eligible, np.arange(0, num_rows, size), dtype=np.uint32)
        options: dict[str, Any] = {"num_layers": num_layers, "batch_rows": batch_rows}
        return Played(Order(counts, seed=seed, epoch=epoch, **options), size, eligible)

    return make
