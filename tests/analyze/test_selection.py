"""Rows that are evaluated, and reading them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlsae.analyze.selection import choose_sequences, first_tokens, read_rows
from mlsae.base.errors import InputError
from mlsae.store import open_store
from mlsae.store.read.split import validation_sequences

SPLIT = {"fraction": 0.2, "seed": 3}


def test_validation_and_train_are_the_split_that_training_used(sample: Any) -> None:
    store = open_store(sample.path)
    held_out = validation_sequences(store.plan.tokens_sha256, 37, 0.2, 3)
    validation = choose_sequences(store, "validation", SPLIT, None)
    train = choose_sequences(store, "train", SPLIT, None)
    np.testing.assert_array_equal(validation, held_out)
    assert len(np.intersect1d(validation, train)) == 0
    together = np.sort(np.concatenate([validation, train]))
    np.testing.assert_array_equal(together, choose_sequences(store, "all", SPLIT, None))
    assert len(together) == 37


def test_max_tokens_keeps_whole_sequences_from_the_first(sample: Any) -> None:
    store = open_store(sample.path)
    assert choose_sequences(store, "all", SPLIT, 3 * 24 + 23).tolist() == [0, 1, 2]
    every = choose_sequences(store, "validation", SPLIT, None)
    two = choose_sequences(store, "validation", SPLIT, 48)
    np.testing.assert_array_equal(two, every[:2])
    np.testing.assert_array_equal(first_tokens(every, 24, 24), every[:1])


def test_less_than_one_sequence_is_refused(sample: Any) -> None:
    with pytest.raises(
        InputError, match="--max-tokens 23 is less than one sequence of the store, "
    ):
        choose_sequences(open_store(sample.path), "all", SPLIT, 23)


def test_validation_rows_of_an_sae_that_held_none_out_are_refused(sample: Any) -> None:
    with pytest.raises(InputError, match="no validation rows: use --rows all"):
        choose_sequences(open_store(sample.path), "validation", {"fraction": 0.0, "seed": 0}, None)


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("batch_rows", "at_once"), [(7, 1), (64, 300), (100_000, 2**20)])
def test_every_unflagged_row_of_the_sequences_is_read_once_in_order(
    sample_maker: Callable[..., Any],
    encoding: str,
    batch_rows: int,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlsae.analyze.selection._ROWS_AT_ONCE", at_once)
    sample = sample_maker(encoding=encoding)
    store = open_store(sample.path)
    sequences = np.array([0, 1, 5, 19, 36])
    rows, tokens, x = zip(*read_rows(store, "resid_post", 3, sequences, batch_rows), strict=True)
    assert all(len(part) == batch_rows for part in rows[:-1])
    assert 0 < len(rows[-1]) <= batch_rows
    every = np.arange(len(sample.tokens))
    expected = every[np.isin(every // 24, sequences) & (sample.token_flags == 0)]
    np.testing.assert_array_equal(np.concatenate(rows), expected)
    np.testing.assert_array_equal(np.concatenate(tokens), expected)
    whole = store.read("resid_post", 3)
    np.testing.assert_array_equal(np.concatenate(x), whole[expected])


def test_shards_without_a_chosen_row_are_not_touched(sample: Any) -> None:
    store = open_store(sample.path)
    assert 24 <= store.shard_rows < 37 * 24 // 3
    needed = {row // store.shard_rows for row in (9 * 24, 10 * 24 - 1)}
    for file in (sample.path / "activations/resid_post/0").glob("c.*"):
        if int(file.name.split(".")[1]) not in needed:
            file.unlink()
    rows = [part for part, *_ in read_rows(store, "resid_post", 0, np.array([9]), 4096)]
    assert (np.concatenate(rows) // 24 == 9).all()
