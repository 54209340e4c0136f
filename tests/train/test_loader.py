"""Batches hold the bytes of the rows that the order names, whoever reads them and from where."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mlsae.store import AnyStore, DamagedStoreError, Store, open_store
from mlsae.store.read import scatter as module
from mlsae.train.data.loader import Batch, Loader
from mlsae.train.data.mixture import Mixture

FORMS = [
    ("float16", "none"),
    ("bfloat16", "none"),
    ("float32", "none"),
    ("int8", "none"),
    ("float16", "zstd"),
    ("int8", "zstd"),
]
Share = tuple[list[bytes], list[int], int]


def plan(store: AnyStore, batch_rows: int = 33, window: int | None = None) -> Mixture:
    return Mixture.plan(
        store,
        "resid_post",
        store.layers,
        batch_rows=batch_rows,
        seed=5,
        skip_positions=1,
        validation=np.array([3, 20]),
        window=window,
    )


def load(mixture: Mixture, start: int, stop: int, **options: int) -> list[Share]:
    """Bytes of every row in turn, their layers, and the rows over ranks, by batch."""
    with Loader(mixture, start=start, stop=stop, **options) as loader:
        return [(row_bytes(batch), batch.layer.tolist(), batch.num_rows) for batch in loader]


def row_bytes(batch: Batch) -> list[bytes]:
    parts = [part.view(torch.uint8).numpy() for part in (batch.x, *batch.more)]
    return [row.tobytes() for row in np.concatenate(parts, axis=1)]


def rows_by_bytes(store: AnyStore) -> dict[tuple[int, bytes], int]:
    """(layer, bytes) → row; random vectors are distinct."""
    names = {}
    for i, layer in enumerate(store.layers):
        parts = [part.view(np.uint8) for part in store.reader("resid_post", layer).read()]
        for row, values in enumerate(np.concatenate(parts, axis=1)):
            names[i, values.tobytes()] = row
    return names


@pytest.mark.parametrize(("encoding", "compression"), FORMS)
@pytest.mark.parametrize("window", [None, 3_000, 6_000])
def test_an_epoch_holds_every_training_row_of_every_layer_once(
    encoding: str, compression: str, window: int | None, sample_maker: Callable, encoded: Callable
) -> None:
    """Byte for byte as stored, under the layer it belongs to."""
    sample = sample_maker()
    store = open_store(encoded(sample, encoding=encoding, compression=compression))
    mixture = plan(store, window=window and window * store.row_bytes // 40)
    names = rows_by_bytes(store)
    seen = [
        (layer, names[layer, row])
        for rows, layers, _ in load(mixture, 0, mixture.epoch_steps)
        for layer, row in zip(layers, rows, strict=True)
    ]
    row = np.arange(store.num_rows)
    wanted = (sample.token_flags == 0) & (row % 24 >= 1) & ~np.isin(row // 24, [3, 20])
    assert sorted(seen) == [(i, r) for i in range(3) for r in np.flatnonzero(wanted)]


def test_batches_do_not_depend_on_where_reading_starts(sample_maker: Callable) -> None:
    """Steps 0 … 2 epochs, read at once or from any step on, epochs' ends included."""
    mixture = plan(open_store(sample_maker().path))
    total = 2 * mixture.epoch_steps + 3
    whole = load(mixture, 0, total)
    assert len(whole) == total
    for start in (1, mixture.epoch_steps - 1, mixture.epoch_steps, total - 1):
        assert load(mixture, start, total) == whole[start:]
    assert whole[0] != whole[mixture.epoch_steps]


@pytest.mark.parametrize(("encoding", "compression"), [("float16", "none"), ("int8", "zstd")])
def test_batches_do_not_depend_on_how_they_are_read(
    encoding: str,
    compression: str,
    sample_maker: Callable,
    encoded: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By one thread or many, a first time or again, and where the system gives no queue."""
    path = encoded(sample_maker(), encoding=encoding, compression=compression)

    def epoch(threads: int, store: Store) -> list[Share]:
        mixture = plan(store)
        return load(mixture, 0, mixture.epoch_steps, threads=threads)

    store = open_store(path)
    whole = epoch(1, store)
    for threads in (1, 2, 8):
        assert epoch(threads, store) == whole
        assert epoch(threads, open_store(path)) == whole
    monkeypatch.setattr(module, "open_queue", lambda: None)
    assert epoch(2, store) == whole


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_batches_of_one(world_size: int, sample_maker: Callable) -> None:
    """Together they read the same rows, each its own."""
    mixture = plan(open_store(sample_maker().path))
    ranks = [
        load(mixture, 0, mixture.epoch_steps, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for whole, *shares in zip(load(mixture, 0, mixture.epoch_steps), *ranks, strict=True):
        assert sorted(row for share in shares for row in share[0]) == sorted(whole[0])
        assert all(share[2] == whole[2] == len(whole[0]) for share in shares)


def test_damage_found_by_the_reading_thread_reaches_the_consumer(sample_maker: Callable) -> None:
    """The store's own error, whatever thread met it; and no thread is left behind."""
    sample = sample_maker()
    path = next((sample.path / "activations/resid_post/1").glob("c.1.0"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    mixture = plan(open_store(sample.path))
    with pytest.raises(DamagedStoreError, match="checksum"):
        load(mixture, 0, mixture.epoch_steps)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("mlsae")]


def test_leaving_early_ends_the_threads(sample_maker: Callable) -> None:
    """After one batch of many, with a window too small to read ahead far."""
    mixture = plan(open_store(sample_maker().path), window=3_000)
    with Loader(mixture, start=0, stop=10 * mixture.epoch_steps) as loader:
        next(loader)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("mlsae")]
