"""Row and latent sums against brute force in float64."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.analyze.sums import LatentSums, RowSums, merge_all

CPU = torch.device("cpu")


def _rows(num_rows: int, seed: int, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 7, generator=generator) * torch.arange(1, 8) + offset
    return x, x + 0.3 * torch.randn(num_rows, 7, generator=generator)


def _brute(x: torch.Tensor, x_hat: torch.Tensor) -> tuple[float, float, float]:
    a: npt.NDArray[np.float64] = x.numpy().astype(np.float64)
    error = ((a - x_hat.numpy().astype(np.float64)) ** 2).sum()
    fvu = error / ((a - a.mean(axis=0)) ** 2).sum()
    published = error / ((a - a.mean()) ** 2).sum()
    return float(fvu), float(published), float(error / a.size)


@pytest.mark.parametrize("sizes", [[100], [1, 99], [33, 0, 50, 17], [0, 100]])
def test_fvu_and_mse_are_those_of_all_rows_however_they_are_split(sizes: list[int]) -> None:
    x, x_hat = _rows(100, seed=0, offset=5.0)
    parts = [RowSums.of(*pair) for pair in zip(x.split(sizes), x_hat.split(sizes), strict=True)]
    merged = merge_all(parts)
    fvu, published, mse = _brute(x, x_hat)
    assert merged.num_rows == 100
    assert merged.fvu() == pytest.approx(fvu, rel=1e-12)
    assert merged.fvu_published() == pytest.approx(published, rel=1e-12)
    assert merged.mse() == pytest.approx(mse, rel=1e-12)


def test_a_mean_far_larger_than_the_spread_costs_no_precision() -> None:
    x, x_hat = _rows(4000, seed=1)
    x, x_hat = x.double() * 1e-3 + 1e5, x_hat.double() * 1e-3 + 1e5
    merged = merge_all([RowSums.of(a, b) for a, b in zip(x.split(7), x_hat.split(7), strict=True)])
    centred = x - x.mean(0)
    expected = float((x - x_hat).square().sum() / centred.square().sum())
    assert merged.fvu() == pytest.approx(expected, rel=1e-6)


def test_published_fvu_is_the_smaller_one_where_channels_have_other_means() -> None:
    x, x_hat = _rows(50, seed=2)
    sums = RowSums.of(x + torch.arange(7) * 10, x_hat + torch.arange(7) * 10)
    fvu, published = sums.fvu(), sums.fvu_published()
    assert fvu is not None
    assert published is not None
    assert published < fvu / 10


def test_without_rows_or_variance_there_is_no_fvu() -> None:
    assert RowSums.empty(7, CPU).fvu() is None
    assert RowSums.empty(7, CPU).fvu_published() is None
    assert RowSums.empty(7, CPU).mse() is None
    same = torch.ones(5, 7)
    assert RowSums.of(same, same * 2).fvu() is None
    assert RowSums.of(same, same * 2).mse() == 1.0


def test_a_latent_counts_where_its_value_is_above_zero() -> None:
    sums = LatentSums(6, CPU)
    sums.add(torch.tensor([[2.0, 0.0], [1.5, 0.25]]), torch.tensor([[4, 1], [4, 0]]))
    sums.add(torch.tensor([[0.5, 0.0]]), torch.tensor([[0, 2]]))
    assert sums.count.tolist() == [2, 0, 0, 0, 2, 0]
    assert sums.total.tolist() == [0.75, 0.0, 0.0, 0.0, 3.5, 0.0]


def test_latent_totals_match_brute_force() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(500, 4, generator=generator) - 0.3
    values = values.clamp(min=0)
    indices = torch.stack([torch.randperm(30, generator=generator)[:4] for _ in range(500)])
    sums = LatentSums(30, CPU)
    for v, i in zip(values.split(64), indices.split(64), strict=True):
        sums.add(v, i)
    dense = np.zeros((500, 30))
    np.put_along_axis(dense, indices.numpy(), values.numpy().astype(np.float64), axis=1)
    np.testing.assert_array_equal(sums.count.numpy(), (dense > 0).sum(axis=0))
    np.testing.assert_allclose(sums.total.numpy(), dense.sum(axis=0), rtol=1e-12)
