"""The order of an epoch, each promise of the sampler in turn."""

import hashlib
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from mlsae.base.errors import InputError
from mlsae.train.data.sampler import NUM_LANES, Order, slice_rows
from mlsae.train.data.walk import Walk

CASES = {
    "one layer": {"num_rows": 3000, "num_layers": 1},
    "three layers": {"num_rows": 3000},
    "batch not divisible": {"num_rows": 2999, "batch_rows": 100},
    "gaps": {"num_rows": 3000, "gaps": 0.05},
    "many gaps": {"num_rows": 3000, "gaps": 0.9},
    "sequences held out": {"num_rows": 3200, "held_out": 0.3, "gaps": 0.05},
    "one row a slice": {"num_rows": 500, "max_rows": 1},
    "store smaller than a batch": {"num_rows": 20, "batch_rows": 96},
    "store of one row": {"num_rows": 1},
    "one row a layer": {"num_rows": 100, "batch_rows": 3},
    "long slices": {"num_rows": 40_000, "max_rows": 512},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_every_eligible_row_of_every_layer_comes_once_an_epoch(
    case: dict[str, float], play: Callable
) -> None:
    """No row is lost, doubled, or visited although it is not eligible."""
    played = play(**case)
    seen = np.zeros((played.order.num_layers, len(played.eligible)), np.int64)
    for batch in played.steps():
        np.add.at(seen, (batch.layer, batch.row), 1)
    assert np.array_equal(seen, np.broadcast_to(played.eligible, seen.shape).astype(np.int64))


@every_case
def test_a_batch_has_equal_rows_of_every_layer_and_no_two_rows_of_a_slice(
    case: dict[str, float], play: Callable
) -> None:
    """Up to the last batch, which alone may be short."""
    played = play(**case)
    order, size = played.order, played.order.batch_rows
    sizes = []
    for batch in played.steps():
        sizes.append(len(batch.row))
        assert batch.num_rows == len(batch.row)
        rows_of_layer = np.bincount(batch.layer, minlength=order.num_layers)
        assert rows_of_layer.max() - rows_of_layer.min() <= 1
        pairs = batch.layer * len(order.counts) + batch.slice
        assert len(np.unique(pairs)) == len(pairs)
    assert len(sizes) == order.num_steps
    assert sizes[:-1] == [size] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= size


@every_case
@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_any_number_of_ranks_sees_the_same_batches(
    case: dict[str, float], world_size: int, play: Callable
) -> None:
    """The ranks' shares are disjoint and make up the batch of one rank."""
    played = play(**case)
    ranks = [played.steps(rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *shares in zip(played.steps(), *ranks, strict=True):
        assert sum(len(share.row) for share in shares) == len(whole.row)
        assert set().union(*(share.items() for share in shares)) == whole.items()
        assert {share.num_rows for share in shares} == {whole.num_rows}


def test_a_lane_holds_its_share_of_a_batch_give_or_take_a_row_a_layer(play: Callable) -> None:
    """Ranks do equal work."""
    played = play(20_000, num_layers=5, batch_rows=400)
    for lane in range(NUM_LANES):
        for batch in list(played.steps(rank=lane, world_size=NUM_LANES))[:-1]:
            assert abs(len(batch.row) - 400 / NUM_LANES) <= 5


@every_case
def test_resuming_at_a_step_equals_never_having_stopped(
    case: dict[str, float], play: Callable
) -> None:
    """Equal rows in equal places, from any step to the end."""
    played = play(**case)
    whole = list(played.steps())
    for step in {0, 1, len(whole) // 3, len(whole) - 1} & set(range(len(whole))):
        resumed = list(played.steps(step))
        assert len(resumed) == len(whole) - step
        for a, b in zip(whole[step:], resumed, strict=True):
            assert np.array_equal(a.layer, b.layer)
            assert np.array_equal(a.row, b.row)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_resumes_too(rank: int, play: Callable) -> None:
    """Resuming commutes with the cut into ranks."""
    played = play(3000, gaps=0.05)
    whole = list(played.steps(rank=rank, world_size=2))
    for a, b in zip(whole[17:], played.steps(17, rank, 2), strict=True):
        assert np.array_equal(a.row, b.row)


GOLDEN = {
    (0, 0, 1): "e161d6d8cfd0dc7b8f5ac2a45d209468b8bc121bb7bdaaa5dde4e55850d841a7",
    (40, 3, 4): "95b41e32bde906d4d7599b31b3bb2fd0a27cef4e3aff2555082769bb0b6a369b",
}
"""(step, rank, world size) → SHA-256; runs that were begun must be able to go on."""


@pytest.mark.parametrize("part", GOLDEN)
def test_the_order_is_what_it_always_was(part: tuple[int, int, int], make_played: Callable) -> None:
    """Every (layer, row) of every batch of three shapes of store."""
    digest = hashlib.sha256()
    shapes = [(6000, 3, 96, 8), (9000, 6, 100, 50), (999, 1, 7, 1)]
    for num_rows, num_layers, batch_rows, size in shapes:
        row = np.arange(num_rows)
        eligible = (row % 64 > 0) & (row * 40_503 % 65_536 > 3_000) & (row // 64 % 10 != 3)
        counts = np.add.reduceat(eligible, np.arange(0, num_rows, size), dtype=np.uint8)
        order = Order(counts, num_layers=num_layers, batch_rows=batch_rows, seed=11, epoch=2)
        for batch in make_played(order, size, eligible).steps(*part):
            in_batch = np.lexsort((batch.row, batch.layer))
            digest.update(np.stack([batch.layer, batch.row])[:, in_batch].astype("<i8").tobytes())
    assert digest.hexdigest() == GOLDEN[part]


def test_epochs_seeds_and_layers_have_orders_of_their_own(play: Callable) -> None:
    """No two of them visit rows in the same order; equal settings always do."""

    def first(**options: int) -> list[int]:
        batch = next(iter(play(3000, **options).steps()))
        return batch.row[batch.layer == options.pop("layer", 0)].tolist()

    assert first() == first()
    orders = [first(), first(epoch=1), first(seed=1)]
    batch = next(iter(play(3000).steps()))
    orders += [batch.row[batch.layer == layer].tolist() for layer in (1, 2)]
    assert len({tuple(rows) for rows in orders}) == 5
    assert all(len(set(a) & set(b)) < len(a) / 2 for a in orders for b in orders if a is not b)


@pytest.mark.parametrize("num_rows", [60_000, 240_000])
@pytest.mark.parametrize("max_rows", [64, 8], ids=["d 512", "d 4096"])
@pytest.mark.parametrize("context_length", [256, 2048])
@pytest.mark.parametrize("gaps", [0.0, 0.05])
def test_rows_of_a_sequence_meet_no_more_often_than_by_chance(
    num_rows: int, max_rows: int, context_length: int, gaps: float, play: Callable
) -> None:
    """Pairs of one sequence in a batch, over an epoch: at most 1.1 × independent sampling.

    Over all pairs, and over the pairs of one layer.
    """
    played = play(
        num_rows, batch_rows=1536, max_rows=max_rows, gaps=gaps, context_length=context_length
    )
    share = np.add.reduceat(played.eligible, np.arange(0, num_rows, context_length), dtype=float)
    same = ((share / share.sum()) ** 2).sum()
    found, expected = np.zeros(2), np.zeros(2)
    for batch in played.steps():
        sequence = batch.row // context_length
        at_layer = np.zeros((3, len(share)))
        np.add.at(at_layer, (batch.layer, sequence), 1)
        for i, counts in enumerate((at_layer.sum(0, keepdims=True), at_layer)):
            sizes = counts.sum(1)
            found[i] += (counts * (counts - 1)).sum() / 2
            expected[i] += (sizes * (sizes - 1)).sum() / 2 * same
    assert (found <= 1.1 * expected).all(), found / expected


def test_slots_turn_to_their_next_slices_at_different_times(play: Callable) -> None:
    """Reading is steady: after the first step, none needs more than three times the mean."""
    order = play(240_000, batch_rows=1536, max_rows=64).order
    opened = np.bincount(np.concatenate([block.opens for block in Walk(order)])).tolist()
    assert opened[0] == 1536
    assert max(opened[1:-1]) <= 3 * np.mean(opened[1:-1])


def test_memory_grows_by_the_counts_alone() -> None:
    """16 times the rows: no more than the one byte a slice that the counts take."""
    peaks = []
    for num_rows in (1 << 20, 1 << 24):
        counts = np.full(num_rows // 64, 64, np.uint8)
        tracemalloc.start()
        order = Order(counts, num_layers=2, batch_rows=4096, seed=0, epoch=0)
        for _ in zip(range(3), Walk(order, order.num_steps // 2), strict=False):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.3 * peaks[0]


@pytest.mark.parametrize("slot_rows", [1, 2, 3, 10, 63, 64, 65, 100, 1000, 12_345])
@pytest.mark.parametrize("max_rows", [1, 8, 64])
def test_a_slot_runs_over_more_than_one_slice(slot_rows: int, max_rows: int) -> None:
    """A slice is at most as long as asked, and shorter than a slot unless both are one row."""
    size = slice_rows(slot_rows * 100, batch_rows=300, num_layers=3, max_rows=max_rows)
    assert 1 <= size <= max_rows
    assert size == 1 or size < slot_rows / 1.5
    if slot_rows > 4 * max_rows:
        assert size >= 0.8 * max_rows


def test_an_impossible_number_of_ranks_is_refused() -> None:
    """The message lists those that fit."""
    order = Order(np.ones(10, np.uint8), num_layers=1, batch_rows=4, seed=0, epoch=0)
    with pytest.raises(InputError, match=r"3 ranks cannot .* 16 lanes .*: start 1, 2, 4, 8, 16"):
        Walk(order, world_size=3)


def test_a_batch_smaller_than_the_layers_is_refused() -> None:
    """Both numbers and the flag are named."""
    with pytest.raises(InputError, match=r"got 2 rows for 3 layers; raise --batch-size"):
        Order(np.ones(10, np.uint8), num_layers=3, batch_rows=2, seed=0, epoch=0)


def test_a_store_without_rows_to_train_on_is_refused() -> None:
    """The message says what can leave none."""
    with pytest.raises(InputError, match=r"no row is left to train on: .*--skip-positions"):
        Order(np.zeros(10, np.uint8), num_layers=1, batch_rows=2, seed=0, epoch=0)


def test_batches_of_real_shape_are_a_mixture_of_the_whole_store(play: Callable) -> None:
    """The rows of one batch spread over the store: their mean is near its middle."""
    played = play(200_000, batch_rows=4096, max_rows=64)
    for batch in list(played.steps())[:5]:
        error = abs(batch.row.mean() / 200_000 - 0.5) * math.sqrt(12 * len(batch.row))
        assert error < 5
