"""Rows, tokens and records as producers have them: of any library, and in one buffer."""

import ml_dtypes
import numpy as np
import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed
from mlsae.store import create, open_store
from mlsae.store.tools.verify import verify

RNG = np.random.default_rng(0)
X = RNG.normal(size=(128, 6)).astype(np.float32)
X_16 = X.astype(ml_dtypes.bfloat16)
SHAPE = {"context_length": 16, "layers": (0,), "d_model": 6}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.from_numpy(X), X),
        (torch.from_numpy(X).requires_grad_(), X),
        (torch.from_numpy(X).double(), X),
        (torch.from_numpy(X).bfloat16(), X_16.astype(np.float32)),
        (X_16, X_16.astype(np.float32)),
        (X.tolist(), X),
        (np.ma.masked_array(X), X),
    ],
    ids=["tensor", "gradient", "double", "bfloat16", "JAX", "list", "none masked"],
)
def test_rows_of_any_library_are_stored_exactly(tmp_path, values, expected):
    tokens = torch.arange(128)
    with create(tmp_path / "a", tokens=tokens, encoding="float32", **SHAPE) as writer:
        writer.append({("resid_post", 0): values})
    store = open_store(tmp_path / "a")
    np.testing.assert_array_equal(store.read("resid_post", 0), expected)
    np.testing.assert_array_equal(store.tokens(), np.arange(128))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ma.masked_less(X, 0), "must be an array without masked values: fill them first"),
        (np.arange(768).reshape(128, 6), "must be floats or float32, got int64"),
        ([[1.0], [1.0, 2.0]], r"must be an array of numbers, got list \("),
        ("rows", "must be an array of numbers, got str"),
        (None, "must be an array of numbers, got NoneType"),
    ],
)
def test_other_rows_are_refused_in_words(tmp_path, values, message):
    with (
        create(tmp_path / "a", tokens=np.arange(128), encoding="float32", **SHAPE) as writer,
        pytest.raises(InputError, match=message),
    ):
        writer.append({("resid_post", 0): values})


def test_numbers_of_numpy_are_numbers(tmp_path):
    """Sizes, layers, and values in the records."""
    with create(
        tmp_path / "a",
        tokens=list(range(128)),
        documents=torch.zeros(128, dtype=torch.long),
        token_flags=np.zeros(128, bool).astype(np.int64),
        context_length=np.int64(16),
        layers=np.arange(2),
        d_model=torch.tensor(6),
        source={"rate": np.float32(0.5)},
        provenance={"seed": np.int64(3)},
    ) as writer:
        writer.append({("resid_post", np.int64(layer)): X for layer in range(2)})
    store = open_store(tmp_path / "a")
    assert store.source == {"rate": 0.5}
    assert store.provenance()[0]["seed"] == 3
    assert verify(tmp_path / "a").problems == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_model": 6.5}, "d_model must be a whole number, got float 6.5"),
        ({"layers": ["0"]}, "a layer must be a whole number, got str 0"),
        ({"source": {"model": object()}}, "source must be a JSON object: object '<object"),
        ({"provenance": {"x": float("nan")}}, "provenance must be a JSON object: Out of range"),
        ({"provenance": [1]}, "provenance must be a JSON object, got list"),
        ({"producer": {"device": {1, 2}}}, "producer must be a JSON object: set"),
        ({"tokens": np.arange(100)}, "tokens must be whole sequences"),
        ({"tokens": np.full(128, -1)}, "tokens must fit uint32, got -1 to -1"),
    ],
)
def test_nothing_is_written_before_arguments_are_checked(tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        create(tmp_path / "a", **{"tokens": np.arange(128), **SHAPE, **wrong})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "float32"])
def test_one_buffer_may_be_filled_again_for_each_call(tmp_path, encoding):
    """Also where floats are stored as they are, so that no copy is made on the way."""
    dtype = {"float16": "f2", "bfloat16": "f4", "float32": "f4"}[encoding]
    buffer = np.zeros((16, 6), dtype)
    with create(tmp_path / "a", tokens=np.arange(128), encoding=encoding, **SHAPE) as writer:
        for number in range(8):
            buffer[:] = number
            writer.append({("resid_post", 0): buffer})
    found = open_store(tmp_path / "a").read("resid_post", 0)[::16, 0]
    assert found.tolist() == list(range(8))


@pytest.mark.parametrize("scale", [1e-15, 1e-20, 1e-25, 1e30])
def test_moments_of_tiny_and_huge_values_are_right(tmp_path, scale):
    """Squares of neither fit into float32; blocks differ in size here and in verify."""
    x = (scale * RNG.normal(size=(512, 6))).astype(np.float32)
    shape = {**SHAPE, "encoding": "float32"}
    with create(tmp_path / "a", tokens=np.arange(512), **shape) as writer:
        for start in range(0, 512, 16):
            writer.append({("resid_post", 0): x[start : start + 16]})
    moments, wide = open_store(tmp_path / "a").moments(skip_positions=0), x.astype(np.float64)
    norm = np.linalg.norm(wide, axis=1).mean()
    np.testing.assert_allclose(moments.norm_mean[0], norm, rtol=1e-5)
    np.testing.assert_allclose(moments.m2[0], ((wide - wide.mean(0)) ** 2).sum(0), rtol=1e-5)
    assert verify(tmp_path / "a").problems == []


@pytest.mark.parametrize("index", [torch.tensor(3), np.int64(3), np.array(3)])
def test_rows_are_read_at_numbers_of_any_library(sample, index):
    """A tensor is no key of a dictionary; taken for one it named a shard that is not there."""
    store = open_store(sample.path)
    expected = store.read("resid_post", 3, 3, 6)
    np.testing.assert_array_equal(store.read("resid_post", index, index, index + 3), expected)
    np.testing.assert_array_equal(store.row_tokens(index, index + 3), [3, 4, 5])
    assert store.check_layers(np.array([0, 1])) == (0, 1)
    with pytest.raises(InputError, match="the first row must be a whole number, got float"):
        store.read("resid_post", 0, float(index), 6)


def test_a_store_is_not_made_in_another(sample):
    with pytest.raises(InputError, match="lies in the activation store"):
        create(sample.path / "deep" / "b", tokens=np.arange(128), **SHAPE)


def test_a_producer_record_is_plain(tmp_path):
    """Numbers of numpy in the record of a shard."""
    with create(
        tmp_path / "a", tokens=np.arange(128), producer={"torch": np.int64(2)}, **SHAPE
    ) as writer:
        writer.append({("resid_post", 0): X})
    assert read_sealed(tmp_path / "a/commits/00000.json")["producer"] == {"torch": 2}
