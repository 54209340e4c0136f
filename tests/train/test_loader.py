"""Batches hold the bytes of the rows that the order names, whoever reads them and from where."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mlsae.store import DamagedStoreError, Store, open_store
from mlsae.train.loader import Loader
from mlsae.train.prefetch import Prefetch
from mlsae.train.rows import Mixture


def plan(store: Store, batch_rows: int = 33, window: int | None = None) -> Mixture:
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


def load(mixture: Mixture, start: int, stop: int, **ranks: int) -> list[tuple[Any, Any, int]]:
    with Loader(mixture, start=start, stop=stop, **ranks) as loader:
        return [(batch.x.clone(), batch.layer, batch.num_rows) for batch in loader]


def rows_by_bytes(store: Store) -> dict[tuple[int, bytes], int]:
    """Which row of which layer an activation vector is; random vectors are distinct."""
    return {
        (i, vector.tobytes()): row
        for i, layer in enumerate(store.layers)
        for row, vector in enumerate(store.read("resid_post", layer))
    }


def raw(x: torch.Tensor) -> np.ndarray:
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("window", [None, 3_000, 6_000])
def test_an_epoch_holds_every_training_row_of_every_layer_once(
    encoding: str, window: int | None, sample_maker: Callable
) -> None:
    """Bit for bit as stored, under the layer it belongs to."""
    sample = sample_maker(encoding=encoding)
    store = open_store(sample.path)
    mixture = plan(store, window=window if encoding != "float32" else window and 2 * window)
    names = rows_by_bytes(store)
    seen = [
        (layer, names[layer, vector.tobytes()])
        for x, layers, _ in load(mixture, 0, mixture.epoch_steps)
        for layer, vector in zip(layers.tolist(), raw(x), strict=True)
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
        for a, b in zip(whole[start:], load(mixture, start, total), strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])
    assert not torch.equal(whole[0][0], whole[mixture.epoch_steps][0])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_batches_of_one(world_size: int, sample_maker: Callable) -> None:
    """Together they read the same rows, each its own."""
    mixture = plan(open_store(sample_maker().path))
    ranks = [
        load(mixture, 0, mixture.epoch_steps, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for whole, *shares in zip(load(mixture, 0, mixture.epoch_steps), *ranks, strict=True):
        together = [v.tobytes() for share in shares for v in raw(share[0])]
        assert sorted(together) == sorted(v.tobytes() for v in raw(whole[0]))
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


def test_prefetch_gives_what_came_before_an_error_first() -> None:
    """Items in order, then the error, then nothing."""

    def items() -> Any:
        yield from range(5)
        raise OSError("no more")

    ahead = Prefetch(items(), 2, "test")
    assert [next(ahead) for _ in range(5)] == list(range(5))
    with pytest.raises(OSError, match="no more"):
        next(ahead)
    ahead.join()
