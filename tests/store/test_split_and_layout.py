"""The validation split and the sizes of chunks and shards are pure functions."""

import numpy as np
import pytest

from mlsae.base.errors import InputError
from mlsae.harvest.compute.batch_size import enough_shards_size
from mlsae.store import open_store
from mlsae.store.format.layout import (
    SHARD_BYTES,
    Layout,
    array_bytes,
    object_bytes,
    plan_layout,
    shard_bytes_for,
)
from mlsae.store.read.split import validation_sequences


def test_the_split_depends_on_text_and_seed_alone():
    """Sorted, without repeats, stable, and different for another text or seed."""
    split = validation_sequences("ab", 1000, 0.05, 0)
    assert len(set(split.tolist())) == len(split) == 50
    assert (np.diff(split) > 0).all()
    assert np.array_equal(split, validation_sequences("ab", 1000, 0.05, 0))
    for other in (("ac", 1000, 0.05, 0), ("ab", 1000, 0.05, 1)):
        assert len(set(split.tolist()) & set(validation_sequences(*other).tolist())) < 15
    assert split[:4].tolist() == [24, 28, 33, 41]


def test_the_split_is_uniform():
    """Over many seeds every sequence is held out about equally often."""
    counts = np.zeros(40)
    for seed in range(2000):
        counts[validation_sequences("ab", 40, 0.1, seed)] += 1
    assert abs(counts - 200).max() < 5 * np.sqrt(200 * 0.9)


@pytest.mark.parametrize(
    ("num_sequences", "fraction", "message"),
    [(10, 1.0, "at least 0 and below 1"), (1, 0.01, "leaves none to train on")],
)
def test_impossible_splits_are_refused(num_sequences, fraction, message):
    """A split that leaves nothing to train on has no meaning."""
    with pytest.raises(InputError, match=message):
        validation_sequences("ab", num_sequences, fraction, 0)
    assert len(validation_sequences("ab", 10, 0.0, 0)) == 0


@pytest.mark.parametrize("d_model", [64, 512, 4096])
@pytest.mark.parametrize(("context_length", "batch"), [(2048, 8), (1023, 3), (7, 1), (1, 1)])
@pytest.mark.parametrize("num_sequences", [3, 50_000])
def test_layouts_keep_whole_batches_and_limits(d_model, context_length, batch, num_sequences):
    """Chunks divide shards, shards are whole batches, objects are few and of the size asked for."""
    layout = plan_layout(
        num_tokens=num_sequences * context_length,
        context_length=context_length,
        layers=range(6),
        sites=["resid_post"],
        d_model=d_model,
        encoding="float16",
        batch_sequences=batch,
    )
    assert layout.shard_rows % layout.chunk_rows == 0
    assert layout.shard_rows % (context_length * batch) == 0
    assert layout.num_shards <= 999
    assert (layout.num_shards - 1) * layout.shard_rows < layout.num_rows
    assert layout.num_rows <= layout.num_shards * layout.shard_rows
    if layout.num_shards > 1:
        assert 2**26 <= layout.shard_rows * d_model * 2 < 5e9


def test_bytes_are_foretold(sample):
    """The size said before a run is the size on disk, its small records estimated."""
    store = open_store(sample.path)
    layout = plan_layout(
        num_tokens=store.num_tokens,
        context_length=24,
        layers=store.layers,
        sites=store.sites,
        d_model=20,
        encoding="float16",
        batch_sequences=4,
        shard_bytes=8000,
    )
    shards = list((sample.path / "activations").rglob("c.*"))
    sizes = array_bytes(layout.num_rows, 20 * 2, layout.chunk_rows, layout.shard_rows)
    assert len(store.layers) * sizes == sum(file.stat().st_size for file in shards)
    on_disk = sum(file.stat().st_size for file in sample.path.rglob("*") if file.is_file())
    assert on_disk <= layout.total_bytes <= 1.3 * on_disk + 4096 * 20


def test_an_object_over_five_gigabytes_is_refused():
    """No shard size helps when 1,000 objects of 5 GB do not hold the store."""
    with pytest.raises(InputError, match=r"a shard would take 8\.21 GB"):
        plan_layout(
            num_tokens=10**9,
            context_length=1000,
            layers=[0],
            sites=["resid_post"],
            d_model=4096,
            encoding="float16",
            batch_sequences=1,
        )


def test_five_terabytes_a_layer_fit_and_no_more():
    """999 objects of at most 5 GB and the array's metadata are the 1,000 objects of a folder."""
    row_bytes, context_length = 4096 * 2, 1024
    limit = 999 * 5 * 10**9 // row_bytes // context_length * context_length

    def planned(num_tokens: int) -> Layout:
        return plan_layout(
            num_tokens=num_tokens,
            context_length=context_length,
            layers=range(32),
            sites=["resid_post"],
            d_model=4096,
            encoding="bfloat16",
            batch_sequences=1,
        )

    layout = planned(int(0.999 * limit) // context_length * context_length)
    assert layout.num_shards == 999
    of_layer = array_bytes(layout.num_rows, row_bytes, layout.chunk_rows, layout.shard_rows)
    assert 4.9e12 < of_layer < 5e12
    assert object_bytes(layout.shard_rows, row_bytes, layout.chunk_rows, layout.shard_rows) <= 5e9
    with pytest.raises(InputError, match=r"over the 5 GB that an object may, and a folder holds 9"):
        planned(int(1.001 * limit) // context_length * context_length)


@pytest.mark.parametrize("d_model", [64, 576, 4096])
@pytest.mark.parametrize("num_tokens", [40_960, 480_256, 10_000_384])
def test_small_stores_have_enough_shards(d_model: int, num_tokens: int):
    """At least 16 of a mebibyte or more, of whole batches; larger stores keep large ones."""
    row_bytes = d_model * 2
    size = shard_bytes_for(num_tokens, row_bytes)
    assert 2**20 <= size <= SHARD_BYTES
    batch = enough_shards_size("cpu", 256, num_tokens // 256)
    assert batch * 256 >= 2048
    layout = plan_layout(
        num_tokens=num_tokens,
        context_length=256,
        layers=[0],
        sites=["resid_post"],
        d_model=d_model,
        encoding="float16",
        batch_sequences=min(batch, 8),
        shard_bytes=size,
    )
    whole = num_tokens * row_bytes
    assert layout.num_shards >= min(16, whole // 2**20)
    assert layout.num_shards <= max(21, whole / SHARD_BYTES * 1.1)
    assert layout.shard_rows >= 2048


def test_a_tiny_store_is_cut_as_before():
    """One shard, whose chunks are no smaller for it."""
    assert shard_bytes_for(1000, 1000) == SHARD_BYTES
