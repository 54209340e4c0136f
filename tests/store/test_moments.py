"""Moments equal a float64 computation over the decoded rows, for every filter."""

import numpy as np
import pytest

from mlsae.store import MASKED, PADDING, SPECIAL, open_store
from mlsae.store.moments import GROUPS, GroupMoments, from_bytes, group_of_rows, to_bytes


@pytest.mark.parametrize("encoding", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("skip", [0, 1, 2, 16])
def test_moments_of_eligible_rows_equal_brute_force(sample_maker, encoding, skip):
    """Count, means, centred second moments, norms, extremes and neighbours' cross moments."""
    made = sample_maker(encoding=encoding)
    store = open_store(made.path)
    moments = store.moments("resid_post", skip)
    eligible = (made.token_flags == 0) & (np.arange(store.num_rows) % 24 >= skip)
    x = np.stack(
        [store.decode(store.read("resid_post", layer))[eligible] for layer in store.layers]
    ).astype(np.float64)
    u = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-5)
    assert moments.layers == store.layers
    assert moments.count == eligible.sum() > 100
    for values, mean, m2 in ((x, moments.mean, moments.m2), (u, moments.u_mean, moments.u_m2)):
        np.testing.assert_allclose(mean, values.mean(1), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(m2, values.var(1) * eligible.sum(), rtol=1e-12)
    np.testing.assert_allclose(moments.norm_mean, np.linalg.norm(x, axis=-1).mean(1), rtol=1e-12)
    np.testing.assert_array_equal(moments.max_abs, np.abs(x).max((1, 2)))
    centred = x - x.mean(1, keepdims=True)
    cross = (centred[:-1] * centred[1:]).sum((1, 2))
    np.testing.assert_allclose(moments.adjacent_cross, cross, rtol=1e-12)
    total = (centred**2).sum((1, 2))
    np.testing.assert_allclose(
        moments.adjacent_cosine(), cross / np.sqrt(total[:-1] * total[1:]), rtol=1e-12
    )


def test_merging_is_exact_far_from_zero():
    """A mean 10⁶ times the spread loses nothing: no E[x²] − E[x]² anywhere."""
    generator = np.random.default_rng(0)
    x = (1e6 + generator.normal(size=(1000, 3))).astype(np.float64)
    total = GroupMoments((0,), 3)
    for start in range(0, 1000, 37):
        piece = x[start : start + 37]
        block = total.block(np.full(len(piece), len(GROUPS) - 1, np.int8))
        block.add_layer(0, piece, None)
        total.merge(block)
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
        from_bytes(data, ["resid_post"], (0, 1), 5)
    with pytest.raises(KeyError):
        from_bytes(data, ["mlp_out"], (0, 1), 4)
