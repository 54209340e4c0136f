"""Moments equal a float64 computation over the decoded rows, for every filter."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlsae.base.errors import InputError
from mlsae.store import MASKED, PADDING, SPECIAL, open_store
from mlsae.store.format.accumulate import Accumulator
from mlsae.store.format.encoding import SiteCodec, decode, encode
from mlsae.store.format.moments import GROUPS, GroupMoments, from_bytes, group_of_rows, to_bytes


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("skip", [0, 1, 2, 16])
def test_moments_of_eligible_rows_equal_brute_force(sample_maker, encoding, skip):
    """Count, means, centred second moments, norms, extremes and neighbours' cross moments."""
    made = sample_maker(encoding=encoding)
    store = open_store(made.path)
    moments = store.moments("resid_post", skip)
    eligible = (made.token_flags == 0) & (np.arange(store.num_rows) % 24 >= skip)
    x = np.stack([store.read("resid_post", layer)[eligible] for layer in store.layers]).astype(
        np.float64
    )
    u = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-5)
    assert moments.layers == store.layers
    assert moments.count == eligible.sum() > 100
    for values, mean, m2 in ((x, moments.mean, moments.m2), (u, moments.u_mean, moments.u_m2)):
        np.testing.assert_allclose(mean, values.mean(1), rtol=1e-6, atol=1e-6 * values.std())
        np.testing.assert_allclose(m2, values.var(1) * eligible.sum(), rtol=1e-6)
    np.testing.assert_allclose(moments.norm_mean, np.linalg.norm(x, axis=-1).mean(1), rtol=1e-6)
    np.testing.assert_array_equal(moments.max_abs, np.abs(x).max((1, 2)))
    centred = x - x.mean(1, keepdims=True)
    cross = (centred[:-1] * centred[1:]).sum((1, 2))
    total = (centred**2).sum((1, 2))
    scale = np.sqrt(total[:-1] * total[1:])
    np.testing.assert_allclose(moments.adjacent_cross / scale, cross / scale, atol=1e-6)
    np.testing.assert_allclose(moments.adjacent_cosine(), cross / scale, atol=1e-6)


def brute_force(x_LND: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[Any]]:
    """Moments of all rows in float64, each straight from its definition."""
    std = x_LND.std(-1, ddof=1, keepdims=True)
    u_LND = (x_LND - x_LND.mean(-1, keepdims=True)) / (std + 1e-5)
    return {
        "mean": x_LND.mean(1),
        "m2": ((x_LND - x_LND.mean(1, keepdims=True)) ** 2).sum(1),
        "u_mean": u_LND.mean(1),
        "u_m2": ((u_LND - u_LND.mean(1, keepdims=True)) ** 2).sum(1),
        "norm_sum": np.linalg.norm(x_LND, axis=-1).sum(1),
        "max_abs": np.abs(x_LND).max((1, 2)),
    }


def ordinary(x: npt.NDArray[np.float64]) -> None:
    """A channel a hundred times the others, and rows fifty times the others."""
    x[:, :, 7] *= 100
    x[:, ::37] *= 50


def nearly_constant(x: npt.NDArray[np.float64]) -> None:
    """All rows alike but for a few, which differ in the last digits."""
    x[...] = x[:, :1]
    x[:, ::41] += 2.0**-8


def constant(x: npt.NDArray[np.float64]) -> None:
    """All rows alike."""
    x[...] = x[:, :1]


def far_from_zero(x: npt.NDArray[np.float64]) -> None:
    """Channels whose means are a hundred times their spread, a few rows that stick out."""
    x[:, ::37] *= 50
    x += 100 * np.sin(np.arange(x.shape[2]))


def drifting(x: npt.NDArray[np.float64]) -> None:
    """Rows whose mean over channels grows to a thousand times their spread."""
    x += np.linspace(0, 1000, x.shape[1])[:, None]


def huge(x: npt.NDArray[np.float64]) -> None:
    """Squares beyond the range of float32."""
    x *= 1e25


@pytest.mark.parametrize("d_model", [20, 512])
@pytest.mark.parametrize(
    ("shape_of", "encoding"),
    [
        (ordinary, "float16"),
        (ordinary, "bfloat16"),
        (nearly_constant, "float16"),
        (nearly_constant, "float32"),
        (constant, "float32"),
        (far_from_zero, "float16"),
        (drifting, "float32"),
        (huge, "bfloat16"),
        (huge, "float32"),
    ],
)
def test_every_group_equals_brute_force(shape_of, encoding, d_model):
    """Groups of one row, of a few and of many, added in unequal pieces, to a relative 1e-6."""
    generator = np.random.default_rng(0)
    num_rows = 700
    x = np.cumsum(generator.normal(size=(3, num_rows, d_model)), 0)
    shape_of(x)
    stored = [encode(layer.astype(np.float32), encoding) for layer in x]
    x = np.stack([decode(layer, encoding) for layer in stored]).astype(np.float64)
    group = np.full(num_rows, len(GROUPS) - 1, np.int8)
    group[::50], group[3], group[100:200] = 0, 5, 7
    moments = Accumulator((0, 1, 2), d_model, SiteCodec(encoding, d_model))
    for start, stop in ((0, 1), (1, 150), (150, 700)):
        pieces = [(layer[start:stop],) for layer in stored]
        assert moments.add(group[start:stop], pieces)
    assert moments.count_G[5] == 1
    for g in (0, 5, 7, len(GROUPS) - 1):
        expected = brute_force(x[:, group == g])
        found = {
            name: values[:, g] for name, values in moments.tensors().items() if name != "count"
        }
        count = moments.count_G[g]
        assert count == (group == g).sum()
        for name in ("", "u_"):
            mean, m2 = expected[f"{name}mean"], expected[f"{name}m2"]
            rms = np.sqrt(mean**2 + m2 / count)
            rms += np.sqrt((rms**2).mean(-1, keepdims=True))
            assert (np.abs(found[f"{name}mean"] - mean) <= 1e-6 * rms).all()
            allowed = 1e-6 * m2
            if name:  # u itself is known to float32's precision only, however little it varies.
                error = 2e-7 * rms
                allowed += count * error**2 + 2 * error * np.sqrt(count * m2)
            assert (np.abs(found[f"{name}m2"] - m2) <= allowed).all()
        np.testing.assert_allclose(found["norm_sum"], expected["norm_sum"], rtol=1e-6)
        np.testing.assert_array_equal(found["max_abs"], expected["max_abs"])
        centred = x[:, group == g] - expected["mean"][:, None]
        cross = (centred[:-1] * centred[1:]).sum((1, 2))
        total = (centred**2).sum((1, 2))
        error = np.abs(found["adjacent_cross"] - cross)
        size = np.sqrt((x[:, group == g] ** 2).sum((1, 2)))
        allowed = 1e-6 * np.sqrt(total[:-1] * total[1:]) + 1e-13 * size[:-1] * size[1:]
        assert (error <= allowed).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_noticed(bad):
    """Wherever they are: the caller is told, and nothing warns."""
    rows = np.ones((2, 300, 8), np.float16)
    rows[1, 299, 3] = bad
    group = np.full(300, 19, np.int8)
    assert not Accumulator((0, 1), 8, SiteCodec("float16", 8)).add(group, [(x,) for x in rows])


def test_moments_made_elsewhere_are_taken_as_arrays():
    """Names and shapes are checked; any real type is widened."""
    made = Accumulator((0, 2), 4, SiteCodec("float32", 4))
    rows = np.random.default_rng(0).normal(size=(2, 6, 4)).astype("f4")
    made.add(np.full(6, 19, np.int8), [(x,) for x in rows])
    arrays = {name: values.astype(np.float32) for name, values in made.tensors().items()}
    taken = GroupMoments.from_arrays((0, 2), 4, arrays)
    assert taken.count_G[19] == 6
    np.testing.assert_allclose(taken.m2_2LGD, made.m2_2LGD, rtol=1e-6)
    with pytest.raises(InputError, match=r"mean must have shape \(2, 20, 5\), got \(2, 20, 4\)"):
        GroupMoments.from_arrays((0, 2), 5, arrays)
    with pytest.raises(
        InputError, match=r"moments must be count, .* got adjacent_cross, count, m2"
    ):
        GroupMoments.from_arrays((0, 2), 4, {k: v for k, v in arrays.items() if k != "mean"})


def test_merging_is_exact_far_from_zero():
    """A mean 10⁶ times the spread loses nothing: no E[x²] − E[x]² anywhere."""
    generator = np.random.default_rng(0)
    x = (1e6 + generator.normal(size=(1000, 3))).astype(np.float64)
    total = GroupMoments((0,), 3)
    last = len(GROUPS) - 1
    for start in range(0, 1000, 37):
        piece = x[start : start + 37]
        alone = GroupMoments((0,), 3)
        alone.count_G[last] = len(piece)
        alone.mean_2LGD[0, 0, last] = piece.mean(0)
        alone.m2_2LGD[0, 0, last] = ((piece - piece.mean(0)) ** 2).sum(0)
        total.merge(alone)
    moments = total.select([len(GROUPS) - 1])
    np.testing.assert_allclose(moments.m2[0], ((x - x.mean(0)) ** 2).sum(0), rtol=1e-9)


def test_the_first_group_that_matches_has_the_row():
    """Special before padding before masked before position."""
    flags = np.array([0, 0, 0, SPECIAL, PADDING | SPECIAL, PADDING | MASKED, MASKED], np.uint8)
    positions = np.array([0, 15, 16, 0, 3, 4, 99])
    names = [GROUPS[g] for g in group_of_rows(flags, positions)]
    assert names == ["position_0", "position_15", "rest", "special", "special", "padding", "masked"]


def test_moments_of_another_shape_are_refused():
    """A moments object is read only as what it was written for."""
    moments = {"resid_post": GroupMoments((0, 1), 4)}
    data = to_bytes(moments)
    assert from_bytes(data, ["resid_post"], (0, 1), 4)["resid_post"].count_G.sum() == 0
    with pytest.raises(ValueError, match="has shape"):
        from_bytes(data, ["resid_post"], (0, 1), 3)
    with pytest.raises(ValueError, match="too few bytes"):
        from_bytes(data, ["resid_post"], (0, 1), 2**24)
    with pytest.raises(KeyError):
        from_bytes(data, ["mlp_out"], (0, 1), 4)
