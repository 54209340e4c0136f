"""Every reader reads what was written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import torch
import zarr

from mlsae.base.errors import InputError
from mlsae.store import open_store
from mlsae.store.format.encoding import SiteCodec, decode, encode

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def as_stored(values: npt.NDArray[np.float32], encoding: str) -> npt.NDArray[np.generic]:
    """Independent encoding, by torch."""
    tensor = torch.from_numpy(values).to(TORCH[encoding])
    return (tensor.view(torch.uint16) if encoding == "bfloat16" else tensor).numpy()


@pytest.mark.parametrize("encoding", sorted(TORCH))
@pytest.mark.parametrize(("num_sequences", "batch_sequences"), [(37, 4), (8, 8), (5, 1)])
def test_every_reader_reads_equal_values(sample_maker, encoding, num_sequences, batch_sequences):
    """Plain zarr, zarrs, tensorstore and open_store agree, short last shards included."""
    made = sample_maker(
        encoding=encoding, num_sequences=num_sequences, batch_sequences=batch_sequences
    )
    store = open_store(made.path)
    group = zarr.open_group(str(made.path), mode="r")
    for layer, values in made.activations.items():
        expected = as_stored(values, encoding)
        key = f"activations/resid_post/{layer}"
        assert np.array_equal(store.reader("resid_post", layer).read()[0], expected)
        assert np.array_equal(group[key][:], expected)
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            through_zarrs = zarr.open_array(str(made.path / key), mode="r")[:]
        assert np.array_equal(through_zarrs, expected)
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(made.path / key)},
        }
        opened = tensorstore.open(spec, read=True).result()
        assert np.array_equal(opened.read().result(), expected)
        widened = torch.from_numpy(values).to(TORCH[encoding]).float().numpy()
        assert np.array_equal(store.read("resid_post", layer), widened)
    for name, given in (
        ("tokens", made.tokens),
        ("documents", made.documents),
        ("token_flags", made.token_flags),
    ):
        assert np.array_equal(getattr(store, name)(), given)
        assert np.array_equal(group[name][:], given)


def test_zarrs_pipeline_is_really_used():
    """The pipeline named above exists; zarr would fall back silently on a typing error."""
    from zarr.registry import get_pipeline_class

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        assert get_pipeline_class().__module__.startswith("zarrs")


def test_bfloat16_rounds_as_torch_does_on_every_kind_of_float():
    """Ties to even, overflow to infinity, subnormals, NaN and signed zeros."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (generator.integers(0, 2**16, 5000, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, ties, np.array([0, 1 << 31, 0x7FFFFFFF], np.uint32)]).view("<f4")
    ours = decode(encode(values, "bfloat16"), "bfloat16")
    theirs = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("encoding", ["float16", "bfloat16"])
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_the_fast_decoding_is_exact_for_every_finite_value(encoding, wide):
    """All 65,536 bit patterns; what is not finite must not pass for a float16."""
    bits = np.arange(2**16, dtype=np.uint16)
    stored = bits.view(np.float16) if encoding == "float16" else bits
    slow = decode(stored, encoding)
    fast = np.empty(2**16, wide)
    SiteCodec(encoding, 2**16).decode_finite_into((stored,), 0, fast)
    finite = np.isfinite(slow)
    assert np.array_equal(fast[finite], slow[finite])
    assert np.array_equal(np.signbit(fast[finite]), np.signbit(slow[finite]))
    limit = 65504 if encoding == "float16" else np.finfo(np.float32).max
    assert not (np.abs(fast[~finite]) <= limit).any()


def test_rows_are_read_across_chunks_and_shards(sample):
    """Any range of rows, and reading into a caller's buffer, equal a slice of the whole."""
    store = open_store(sample.path)
    whole = store.read("resid_post", 1)
    assert store.shard_rows < store.num_rows
    assert store.chunk_rows < store.shard_rows
    generator = np.random.default_rng(0)
    for _ in range(200):
        start, stop = np.sort(generator.integers(0, store.num_rows + 1, 2))
        fresh = open_store(sample.path) if start % 7 == 0 else store
        assert np.array_equal(fresh.read("resid_post", 1, start, stop), whole[start:stop])
        buffer = np.zeros((stop - start, store.d_model), store.parts[0].dtype)
        store.reader("resid_post", 1).read_into([buffer], start)
        assert np.array_equal(buffer, whole[start:stop])


def test_eligible_rows_have_no_flag_and_a_late_position(sample):
    """Eligibility is flags == 0 and position ≥ skip, the flags alone decide the rest."""
    store = open_store(sample.path)
    position = np.arange(store.num_rows) % 24
    for skip in (0, 1, 5):
        expected = (sample.token_flags == 0) & (position >= skip)
        assert np.array_equal(store.eligible(skip), expected)
        assert np.array_equal(store.eligible(skip, 100, 300), expected[100:300])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.read("resid_post", 2), "does not hold layer 2; it has 0, 1, 3"),
        (lambda s: s.read("mlp_out", 0), "does not hold site mlp_out"),
        (lambda s: s.read("resid_post", 0, 0, 889), "rows 0 to 889 are not in 0 to 888"),
        (lambda s: s.moments(skip_positions=17), "skip_positions must be 0 to 16"),
    ],
)
def test_asking_for_what_is_not_there_names_what_is(
    sample, call: Callable[[object], object], message: str
):
    """Reads outside the store are refused in one line."""
    with pytest.raises(InputError, match=message):
        call(open_store(sample.path))


def test_the_writer_gives_the_bytes_that_zarr_python_gives(sample_maker, tmp_path: Path):
    """Our shard files are byte-identical to zarr-python's of the same metadata."""
    made = sample_maker(layers=(0,), num_sequences=40)
    key = "activations/resid_post/0"
    metadata = (made.path / key / "zarr.json").read_bytes()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "zarr.json").write_bytes(metadata)
    array = zarr.open_array(str(theirs), mode="r+")
    array[:] = as_stored(made.activations[0], "float16")
    names = sorted(path.name for path in theirs.iterdir())
    assert names == sorted(path.name for path in (made.path / key).iterdir())
    for name in names:
        assert (theirs / name).read_bytes() == (made.path / key / name).read_bytes(), name
