"""Rows that are trained on, against a computation over whole arrays."""

from collections.abc import Callable

import numpy as np
import pytest

from mlsae.base.errors import InputError
from mlsae.store import open_store
from mlsae.store.format.positions import kept_positions
from mlsae.train.data import rows as module
from mlsae.train.data.mixture import Mixture
from mlsae.train.data.rows import TrainingRows
from mlsae.train.data.sampler import owned_slots


@pytest.mark.parametrize("skip_positions", [0, 1, 3])
@pytest.mark.parametrize("slice_rows", [1, 7, 24, 100, 10_000])
def test_rows_are_those_without_flag_beyond_the_first_and_not_held_out(
    skip_positions: int,
    slice_rows: int,
    sample_maker: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mask of any range, the total, and every slice's count."""
    monkeypatch.setattr(module, "_BLOCK_ROWS", 200)
    sample = sample_maker(batch_sequences=5)
    held_out = np.array([0, 4, 5, 36])
    rows = TrainingRows(open_store(sample.path), skip_positions, held_out)
    row = np.arange(37 * 24)
    expected = (sample.token_flags == 0) & (row % 24 >= skip_positions)
    expected &= ~np.isin(row // 24, held_out)
    for start, stop in [(0, 888), (0, 1), (90, 150), (100, 101), (887, 888)]:
        assert np.array_equal(rows.mask(start, stop), expected[start:stop])
    assert rows.count() == expected.sum()
    counts = rows.slice_counts(slice_rows)
    assert counts.tolist() == [
        expected[i : i + slice_rows].sum() for i in range(0, 888, slice_rows)
    ]
    assert counts.itemsize == np.min_scalar_type(slice_rows).itemsize


@pytest.mark.parametrize("skip_positions", [0, 1, 3])
def test_rows_of_kept_positions_are_those_of_the_full_store_that_were_kept(
    skip_positions: int,
    sample_maker: Callable,
    thinned: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal tokens and values are trained on, in any range and by slice."""
    monkeypatch.setattr(module, "_BLOCK_ROWS", 50)
    sample = sample_maker(batch_sequences=5)
    full, kept = open_store(sample.path), open_store(thinned(sample, num=7))
    held_out = np.array([0, 4, 5, 36])
    whole = TrainingRows(full, skip_positions, held_out).mask(0, full.num_rows)
    rows = TrainingRows(kept, skip_positions, held_out)
    tokens = (kept_positions(5, 0, 37, 24, 7) + 24 * np.arange(37)[:, None]).ravel()
    expected = whole[tokens]
    assert 0 < expected.sum() < len(expected) == kept.num_rows == 37 * 7
    for start, stop in [(0, 259), (0, 1), (26, 50), (34, 36), (258, 259)]:
        assert np.array_equal(rows.mask(start, stop), expected[start:stop])
    assert rows.count() == expected.sum()
    assert rows.slice_counts(5).tolist() == [expected[i : i + 5].sum() for i in range(0, 259, 5)]
    for layer in full.layers:
        ours, theirs = (store.read("resid_post", layer) for store in (kept, full))
        assert np.array_equal(ours[rows.mask(0, 259)], theirs[tokens[expected]])


@pytest.mark.parametrize("skip_positions", [0, 1, 3])
@pytest.mark.parametrize("slice_rows", [1, 7, 24, 100])
@pytest.mark.parametrize("kept", [24, 7])
def test_places_are_those_of_the_rows_in_their_slices(
    skip_positions: int, slice_rows: int, kept: int, sample_maker: Callable, thinned: Callable
) -> None:
    """Any slices are taken in any order, the short last one included."""
    sample = sample_maker(batch_sequences=5)
    store = open_store(sample.path if kept == 24 else thinned(sample, num=kept))
    rows = TrainingRows(store, skip_positions, np.array([0, 4, 5, 36]))
    counts = rows.slice_counts(slice_rows).astype(np.int64)
    slices = np.random.default_rng(0).permutation(len(counts))
    mask = np.zeros(len(counts) * slice_rows, np.bool_)
    mask[: store.num_rows] = rows.mask(0, store.num_rows)
    found = rows.places(slices, counts[slices], slice_rows)
    for slice_, places in zip(slices.tolist(), found, strict=True):
        expected = np.flatnonzero(mask[slice_ * slice_rows : (slice_ + 1) * slice_rows])
        assert places[: counts[slice_]].tolist() == expected.tolist()


def test_flags_are_read_only_where_a_row_has_one(
    sample_maker: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First positions, sequences held out and the store's end follow from a row's number."""
    sample = sample_maker()
    store = open_store(sample.path)
    rows = TrainingRows(store, 1, np.array([0, 4, 5, 36]))
    counts = rows.slice_counts(7).astype(np.int64)
    number = np.arange(len(sample.tokens))
    counted = (number % 24 >= 1) & ~np.isin(number // 24, [0, 4, 5, 36])
    with_flags = np.unique(number[counted & (sample.token_flags != 0)] // 7)
    read, row_flags = [], store.row_flags

    def listen(start: int, stop: int) -> np.ndarray:
        read.append(start // 7)
        return row_flags(start, stop)

    monkeypatch.setattr(store, "row_flags", listen)
    rows.places(np.arange(len(counts)), counts, 7)
    assert 0 < len(with_flags) < len(counts) / 2
    assert read == with_flags.tolist()


def test_a_window_sets_the_slices(sample_maker: Callable) -> None:
    """A smaller window means shorter slices; with the batches held it is kept to."""
    store = open_store(sample_maker(encoding="float32", d_model=32).path)
    sizes = []
    for window in (5_000, 16_000, None):
        mixture = Mixture.plan(
            store,
            "resid_post",
            store.layers,
            batch_rows=30,
            seed=0,
            skip_positions=1,
            validation=np.array([3]),
            window=window,
        )
        assert window is None or mixture.window_bytes(0, 1) <= window + 5 * 30 * store.row_bytes
        sizes.append(mixture.slice_rows)
    assert sizes == sorted(sizes)
    assert sizes[0] == 1 < sizes[1]


def test_a_window_of_less_than_a_row_a_slot_is_refused(sample_maker: Callable) -> None:
    """The bytes needed and the bytes asked for are named."""
    store = open_store(sample_maker(encoding="float32", d_model=32).path)
    with pytest.raises(InputError, match=r"--window must hold .*, 4\.22 kB, got 2 kB; raise it"):
        Mixture.plan(
            store,
            "resid_post",
            store.layers,
            batch_rows=30,
            seed=0,
            skip_positions=1,
            validation=np.array([], np.int64),
            window=2_000,
        )


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
@pytest.mark.parametrize("batch_rows", [3, 50, 1001])
def test_the_slots_of_a_rank_are_those_that_the_order_gives_it(
    sample_maker: Callable, batch_rows: int, world_size: int
) -> None:
    """Memory is reserved for the slots that `owned_slots` deals out, and ranks leave none."""
    store = open_store(sample_maker().path)
    mixture = Mixture.plan(
        store,
        "resid_post",
        store.layers,
        batch_rows=batch_rows,
        seed=0,
        skip_positions=1,
        validation=np.array([3, 7]),
        window=None,
    )
    layer, slot = np.arange(len(store.layers))[:, None], np.arange(mixture.num_slots)
    dealt = [int(owned_slots(layer, slot, r, world_size).sum()) for r in range(world_size)]
    assert [mixture.rank_slots(r, world_size) for r in range(world_size)] == dealt
    assert sum(dealt) == len(store.layers) * mixture.num_slots


def test_a_batch_is_at_most_an_epoch(sample_maker: Callable) -> None:
    """In one order, and without memory for rows that are not there."""
    store = open_store(sample_maker().path)

    def plan(batch_rows: int, skip_positions: int = 1) -> Mixture:
        return Mixture.plan(
            store,
            "resid_post",
            store.layers,
            batch_rows=batch_rows,
            seed=0,
            skip_positions=skip_positions,
            validation=np.array([3, 7]),
        )

    whole = plan(2286)
    assert whole.epoch_rows == 2286
    for huge in (plan(10**9), plan(2**62)):
        assert huge.batch_rows == whole.epoch_rows
        assert huge.window_bytes(0, 1) == whole.window_bytes(0, 1) < 10**6
        assert (huge.order(0).starts == whole.order(0).starts).all()


def test_a_store_without_a_row_to_train_on_is_refused(sample_maker: Callable) -> None:
    """Where every sequence is held out."""
    store = open_store(sample_maker().path)
    with pytest.raises(InputError, match="no row is left to train on: every row has a flag, is"):
        Mixture.plan(
            store,
            "resid_post",
            store.layers,
            batch_rows=30,
            seed=0,
            skip_positions=1,
            validation=np.arange(store.num_sequences),
        )
