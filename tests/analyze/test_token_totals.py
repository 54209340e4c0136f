"""Entropies over token ids, added up in any number of parts."""

import numpy as np
import pytest

from mlsae.analyze.measure.rows import token_totals
from mlsae.analyze.measure.rows.token_totals import TokenTotals


@pytest.mark.parametrize("held", [1, 50, 2**20])
def test_parts_add_up_whenever_they_are_merged(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_totals, "_HELD", held)
    generator = np.random.default_rng(0)
    dense = np.zeros((6, 200_000))
    found = TokenTotals()
    for _ in range(20):
        latents, ids = generator.integers(0, 5, 30), generator.choice([0, 3, 7, 199_999], 30)
        totals = generator.exponential(size=30)
        found.add(latents, ids, totals)
        np.add.at(dense, (latents, ids), totals)
    entropy, num_ids = found.entropies(6)
    assert num_ids.tolist() == [4, 4, 4, 4, 4, 0]
    for j in range(5):
        p = dense[j][dense[j] > 0] / dense[j].sum()
        assert entropy[j] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)
    assert np.isnan(entropy[5])


def test_one_token_id_has_no_entropy_and_equal_ones_the_most() -> None:
    found = TokenTotals()
    found.add(np.array([0, 1, 1, 1, 1]), np.array([9, 0, 1, 2, 3]), np.full(5, 0.1))
    found.add(np.array([0]), np.array([9]), np.array([5.0]))
    entropy, num_ids = found.entropies(2)
    assert entropy.tolist() == [0.0, pytest.approx(np.log(4))]
    assert num_ids.tolist() == [1, 4]


def test_nothing_added_is_no_entropy() -> None:
    entropy, num_ids = TokenTotals().entropies(3)
    assert np.isnan(entropy).all()
    assert num_ids.tolist() == [0, 0, 0]
