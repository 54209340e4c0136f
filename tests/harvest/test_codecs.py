"""Stored values made where the activations are, against those that the store makes on the host."""

from typing import Any

import numpy as np
import pytest
import torch

from mlsae.harvest.compute import codecs as module
from mlsae.harvest.compute.codecs import UNSOUND, FloatCodec, Int8Codec, Scratch
from mlsae.store import Calibration, Calibrator
from mlsae.store.format.encoding import SiteCodec, encode_int8, num_blocks

KEY = ("resid_post", 0)
WIDTHS = (1, 20, 64, 100, 192)


def hard_rows(width: int, num_rows: int = 700) -> np.ndarray:
    """A channel × 100, rows × 50, a channel that never moves, rows of zeros, tiny and large."""
    generator = np.random.default_rng(width)
    x = generator.standard_t(4, size=(num_rows, width)) * np.linspace(0.1, 3, width) + 2
    x[:, width // 2] *= 100
    x[::97] *= 50
    x[:, width // 3] = 7.25
    x[5:9] = 0
    x[11] *= 1e-12
    x[13] *= 1e5
    return x.clip(-6e4, 6e4).astype(np.float32)


def calibrated(x: np.ndarray) -> Calibration:
    calibrator = Calibrator([KEY], x.shape[1])
    calibrator.add({KEY: x[20:]})
    return calibrator.result()


def codec_of(x: np.ndarray) -> tuple[Int8Codec, np.ndarray, np.ndarray]:
    site = calibrated(x).sites["resid_post"]
    return Int8Codec(site.mean[0], site.scale[0], Scratch()), site.mean[0], site.scale[0]


@pytest.fixture(params=[1 << 18, 1 << 10])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once, and a few at a time."""
    monkeypatch.setitem(module.PIECE_VALUES, "cpu", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_int8_is_what_the_store_makes_of_the_same_floats(width: int, dtype: torch.dtype) -> None:
    x = torch.from_numpy(hard_rows(width)).to(dtype)
    codec, mean, scale = codec_of(hard_rows(width))
    encoded = codec.encode(x)
    assert [part.dtype for part in encoded.parts] == [kind for kind, _ in codec.parts]
    quanta, exponents = (part.numpy() for part in encoded.parts)
    expected_quanta, expected_exponents = encode_int8(x.float().numpy(), mean, scale)
    # A logarithm of float32 may fall on the other side of a whole number.
    same = exponents == expected_exponents
    assert same.mean() > 0.999
    assert np.abs(exponents.astype(int) - expected_exponents).max() <= 1
    of_channel = np.repeat(same, 64, axis=1)[:, :width]
    np.testing.assert_array_equal(quanta[of_channel], expected_quanta[of_channel])
    assert encoded.largest is not None
    y = (x.double().numpy() - mean) / scale.astype(float)
    assert float(encoded.largest) == pytest.approx(np.abs(y).max(), rel=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_int8_is_the_nearest_value_of_the_least_exponent(width: int) -> None:
    """Against the specification's formula in float64."""
    x = hard_rows(width)
    codec, mean, scale = codec_of(x)
    quanta, exponents = (part.numpy() for part in codec.encode(torch.from_numpy(x)).parts)
    assert exponents.shape == (len(x), num_blocks(width))
    y = (x.astype(float) - mean) / scale
    for block in range(num_blocks(width)):
        channels = slice(64 * block, 64 * (block + 1))
        largest = np.abs(y[:, channels]).max(axis=1)
        k = exponents[:, block].astype(float)
        # No smaller exponent would do, but for float32's last bits and the ends of the range.
        is_held = k < 127
        assert is_held.sum() > 0.95 * len(x)
        assert (largest <= 127 * np.exp2(k / 8) * (1 + 1e-6))[is_held].all()
        assert (largest >= 127 * np.exp2((k - 1) / 8) * (1 - 1e-6))[k > -128].all()
        step = np.exp2(k / 8)[:, None]
        error = np.abs(quanta[:, channels] - y[:, channels] / step)
        assert error[is_held].max() <= 0.5 + 1e-4
        clipped = np.abs(y[:, channels]) > 127 * step
        np.testing.assert_array_equal(
            quanta[:, channels][clipped], 127 * np.sign(y[:, channels])[clipped]
        )
    assert np.abs(quanta.astype(int)).max() <= 127


@pytest.mark.parametrize("width", WIDTHS)
def test_int8_decodes_to_the_bit_as_the_store_does(width: int) -> None:
    x = hard_rows(width)
    codec, _, _ = codec_of(x)
    parts = codec.encode(torch.from_numpy(x)).parts
    out = torch.empty(x.shape)
    codec.decode_into(parts, out)
    on_host = SiteCodec("int8", width, calibrated(x).sites["resid_post"])
    stored = tuple(part.numpy() for part in parts)
    np.testing.assert_array_equal(out.numpy(), on_host.decode(stored, 0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_value_that_is_not_finite_is_marked_and_shows_in_the_largest(bad: float) -> None:
    x = hard_rows(100)
    codec, _, _ = codec_of(x)
    clean = codec.encode(torch.from_numpy(x)).parts[0].clone()
    x[30, 70] = bad
    encoded = codec.encode(torch.from_numpy(x))
    assert encoded.largest is not None
    assert not encoded.largest.isfinite()
    quanta = encoded.parts[0]
    assert (quanta == UNSOUND).any(dim=1).nonzero().tolist() == [[30]]
    assert quanta[30, 64] == UNSOUND
    others = torch.ones(quanta.shape, dtype=torch.bool)
    others[30, 64:] = False
    assert torch.equal(quanta[others], clean[others])
    values, is_sound = codec.sound(encoded.parts)
    assert torch.equal(is_sound, others)
    assert values[is_sound].isfinite().all()


def test_one_scratch_serves_batches_of_different_sizes() -> None:
    """Values left by a longer batch are not in the padding of a shorter one's last block."""
    x = hard_rows(100)
    codec, mean, scale = codec_of(x)
    codec.encode(torch.from_numpy(x * 1e4))
    for num_rows in (3, 200, 10):
        quanta, exponents = codec.encode(torch.from_numpy(x[:num_rows])).parts
        expected = encode_int8(x[:num_rows], mean, scale)
        np.testing.assert_array_equal(exponents.numpy(), expected[1])
        np.testing.assert_array_equal(quanta.numpy(), expected[0])


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "float32"])
def test_floats_are_cast_and_come_back(encoding: Any) -> None:
    x = torch.from_numpy(hard_rows(20))
    codec = FloatCodec(encoding, 20)
    (stored,) = codec.encode(x).parts
    assert stored.dtype == getattr(torch, encoding)
    out = torch.empty(x.shape)
    codec.decode_into((stored,), out)
    assert torch.equal(out, x.to(stored.dtype).float())
