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
from mlsae.store.format.calibration import Calibrator
from mlsae.train.data.sampler import Order, slice_rows
from mlsae.train.data.walk import Walk

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
    """Text and values of a sample in a store beside it that keeps some positions.

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
            batch_sequences=full.plan.batch_sequences,
            keep_positions=num,
            keep_seed=seed,
            shard_bytes=3000,
        ) as writer:
            tokens = writer.row_tokens(0, writer.num_rows)
            writer.append({("resid_post", i): x[tokens] for i, x in sample.activations.items()})
        return path

    return make


@pytest.fixture
def encoded() -> Callable[..., Path]:
    """Text and values of a sample in a store beside it, in another encoding.

    `encoded(sample, encoding="int8", compression="zstd")`.
    """

    def make(sample: Any, *, encoding: str, compression: str = "none") -> Path:
        full = open_store(sample.path)
        path = Path(sample.path.with_name(f"{sample.path.name}-{encoding}-{compression}"))
        rows = {("resid_post", i): x for i, x in sample.activations.items()}
        calibrator = Calibrator(rows, full.d_model)
        eligible = full.eligible()
        calibrator.add({key: x[eligible] for key, x in rows.items()})
        with create(
            path,
            tokens=sample.tokens,
            context_length=full.context_length,
            layers=full.layers,
            d_model=full.d_model,
            documents=sample.documents,
            token_flags=sample.token_flags,
            encoding=encoding,
            compression=compression,
            calibration=calibrator.result() if encoding == "int8" else None,
            max_added_fvu=1,
            batch_sequences=full.plan.batch_sequences,
            shard_bytes=3000,
        ) as writer:
            writer.append(rows)
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
        walk = Walk(self.order, step, rank, world_size)
        places, last_step = len(walk.layer), self.order.num_steps
        before = walk.rows_before(np.arange(last_step + 1))
        step_of = np.repeat(np.arange(last_step), np.diff(before))
        columns = np.full((3, len(step_of)), -1)
        for block in walk:
            parts, order = block.parts, self.order.part_order(block.parts)
            row = rows[np.minimum(starts[parts.slice][:, None] + order, len(rows) - 1)]
            turn = np.arange(row.shape[1])
            at = (block.round[:, None] + turn) * places + block.place[:, None]
            given = turn < parts.num_rows[:, None]
            each = [parts.layer[:, None], row, parts.slice[:, None]]
            columns[:, at[given]] = [np.broadcast_to(c, given.shape)[given] for c in each]
            visits = np.where(given, step_of[np.minimum(at, len(step_of) - 1)], -1)
            for found, expected in zip(walk.visits(block, len(turn)), (visits, at), strict=True):
                assert np.array_equal(found[given], expected[given])
            closes = visits.max(axis=1, initial=-1)
            opens = np.where(visits < step, last_step, visits).min(axis=1, initial=last_step)
            # Parts under way when the walk begins are opened then, whenever they are due.
            assert np.array_equal(block.opens, np.where(block.opens == step, step, opens))
            assert (block.opens <= opens).all()
            assert np.array_equal(block.closes, closes)
            for number in block.steps:
                start, stop = before[number : number + 2].tolist()
                layer, row, slice_ = columns[:, start:stop]
                assert (row >= 0).all()
                assert np.array_equal(walk.layers(start, stop), layer)
                yield Batch(layer, row, slice_, walk.batch_rows(number))


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
