"""Row and latent sums against brute force in float64."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.analyze.measure.bootstrap import ratio
from mlsae.analyze.measure.rows.sums import (
    CosineSum,
    GroupedRows,
    LatentSums,
    RowSums,
    centred,
)

CPU = torch.device("cpu")
Float = npt.NDArray[np.float64]


def _rows(num_rows: int, seed: int, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 7, generator=generator) * torch.arange(1, 8) + offset
    return x, x + 0.3 * torch.randn(num_rows, 7, generator=generator)


def _summed(
    x: torch.Tensor,
    x_hat: torch.Tensor,
    values: torch.Tensor | None = None,
    *,
    keys: list[int] | None = None,
    batch: int = 100,
    reference: float = 0.0,
) -> RowSums:
    """The sums by key, one key if none are given."""
    of = torch.tensor(keys or [0] * len(x))
    values = torch.zeros(len(x), 1) if values is None else values
    num_keys = int(of.max()) + 1
    rows = GroupedRows(num_keys, np.full(7, reference), CPU)
    for part in zip(
        of.split(batch), x.split(batch), x_hat.split(batch), values.split(batch), strict=True
    ):
        rows.add(*part)
    return rows.sums(0, num_keys)


def _brute(x: torch.Tensor, x_hat: torch.Tensor, values: torch.Tensor) -> dict[str, float]:
    """Every figure by its definition, one row at a time where it is a mean over rows."""
    a, b = x.numpy().astype(np.float64), x_hat.numpy().astype(np.float64)
    z = values.numpy().astype(np.float64)
    error = ((a - b) ** 2).sum()
    fvu = error / ((a - a.mean(axis=0)) ** 2).sum()
    cosines = [p @ q / np.sqrt((p @ p) * (q @ q)) for p, q in zip(a, b, strict=True)]
    return {
        "fvu": fvu,
        "fvu_published": error / ((a - a.mean()) ** 2).sum(),
        "explained_variance": 1 - fvu,
        "mse": error / a.size,
        "cosine": np.mean(cosines),
        "relative_reconstruction_bias": np.mean([q @ q for q in b])
        / np.mean([p @ q for p, q in zip(a, b, strict=True)]),
        "l0": np.mean([(row != 0).sum() for row in z]),
        "l1": np.mean([np.abs(row).sum() for row in z]),
        "density": np.mean([(row != 0).sum() for row in z]) / 30,
    }


def _figures(sums: RowSums, weights: Float) -> dict[str, Float]:
    return {name: ratio(*of) for name, of in sums.weighted(weights).ratios(30).items()}


@pytest.mark.parametrize("batch", [1, 33, 100])
@pytest.mark.parametrize("reference", [0.0, 5.0, 40.0])
def test_figures_are_those_of_all_rows_whatever_the_batches_and_the_reference(
    batch: int, reference: float
) -> None:
    x, x_hat = _rows(100, seed=0, offset=5.0)
    values = torch.randn(100, 4, generator=torch.Generator().manual_seed(9))
    values[values.abs() < 0.5] = 0
    sums = _summed(x, x_hat, values, batch=batch, reference=reference)
    expected = _brute(x, x_hat, values)
    found = _figures(sums, np.ones((1, 1)))
    assert sums.num_rows == 100
    assert found.keys() == expected.keys()
    for name, of in found.items():
        assert of[0] == pytest.approx(expected[name], rel=1e-12), name


def test_weighted_groups_are_their_rows_as_often() -> None:
    """A group may have no rows, and keys need not come in order or together."""
    x, x_hat = _rows(60, seed=4, offset=2.0)
    values = torch.rand(60, 3, generator=torch.Generator().manual_seed(5))
    keys = ([2] * 10 + [0] * 7 + [2] * 3 + [4] * 10) * 2
    weights = np.array([[1, 1, 1, 1, 1], [0, 3, 2, 1, 1], [2, 0, 0, 0, 1.0]])
    found = _figures(_summed(x, x_hat, values, keys=keys, batch=13), weights)
    for n, row in enumerate(weights):
        often = torch.tensor([int(row[key]) for key in keys])
        repeated = (part.repeat_interleave(often, dim=0) for part in (x, x_hat, values))
        for name, value in _brute(*repeated).items():
            assert found[name][n] == pytest.approx(value, rel=1e-12), name


def test_disjoint_sets_of_rows_add_up() -> None:
    x, x_hat = _rows(40, seed=6)
    both = _summed(x[:15], x_hat[:15]) + _summed(x[15:], x_hat[15:])
    whole = _summed(x, x_hat)
    np.testing.assert_allclose(both.scalars, whole.scalars, rtol=1e-12)
    np.testing.assert_allclose(both.offset, whole.offset, rtol=1e-12)


def test_a_mean_far_larger_than_the_spread_costs_no_precision() -> None:
    x, x_hat = _rows(4000, seed=1)
    x, x_hat = x.double() * 1e-3 + 1e5, x_hat.double() * 1e-3 + 1e5
    sums = _summed(x, x_hat, batch=7, reference=1e5)
    centred = x - x.mean(0)
    expected = float((x - x_hat).square().sum() / centred.square().sum())
    assert ratio(*sums.fvu())[0] == pytest.approx(expected, rel=1e-6)


def test_published_fvu_is_the_smaller_one_where_channels_have_other_means() -> None:
    x, x_hat = _rows(50, seed=2)
    sums = _summed(x + torch.arange(7) * 10, x_hat + torch.arange(7) * 10)
    assert ratio(*sums.fvu_published())[0] < ratio(*sums.fvu())[0] / 10


@pytest.mark.parametrize("reference", [0.0, 0.1, 0.7])
def test_without_rows_or_variance_there_is_no_fvu(reference: float) -> None:
    empty = _figures(GroupedRows(1, np.full(7, reference), CPU).sums(0, 1), np.ones((1, 1)))
    assert all(np.isnan(of).all() for of in empty.values())
    same = torch.full((50, 7), 0.1)
    found = _figures(_summed(same, same * 2, reference=reference), np.ones((1, 1)))
    assert np.isnan(found["fvu"][0])
    assert np.isnan(found["explained_variance"][0])
    assert found["mse"][0] == pytest.approx(0.01)
    assert found["relative_reconstruction_bias"][0] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("rebuild", "name", "expected"),
    [
        (torch.zeros_like, "cosine", 0.0),
        (lambda x: 0.5 * x, "relative_reconstruction_bias", 0.5),
        (lambda x: -x, "cosine", -1.0),
        (lambda x: x, "explained_variance", 1.0),
    ],
)
def test_plain_reconstructions_have_the_figures_that_they_must(
    rebuild: Callable[[torch.Tensor], torch.Tensor], name: str, expected: float
) -> None:
    x, _ = _rows(30, seed=7)
    found = _figures(_summed(x, rebuild(x)), np.ones((1, 1)))
    assert found[name][0] == pytest.approx(expected, abs=1e-12)


def test_a_bias_without_agreement_is_not_defined() -> None:
    x, _ = _rows(30, seed=8)
    found = _figures(_summed(x, -x), np.ones((1, 1)))
    assert np.isnan(found["relative_reconstruction_bias"][0])


def test_a_reconstruction_at_right_angles_to_its_rows_has_no_bias() -> None:
    """The rounding of float32 leaves a little of x in x̂; 1 / 1e-8 is no bias."""
    x, _ = _rows(30, seed=8, offset=3.0)
    x_hat = torch.zeros_like(x)
    x_hat[:, 0], x_hat[:, 1] = x[:, 1], -x[:, 0]
    x_hat += 1e-8 * x
    found = _figures(_summed(x, x_hat, reference=3.0), np.ones((1, 1)))
    assert np.isnan(found["relative_reconstruction_bias"][0])
    tilted = _figures(_summed(x, x_hat + 1e-3 * x, reference=3.0), np.ones((1, 1)))
    assert tilted["relative_reconstruction_bias"][0] > 100


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


def test_the_mean_of_cosines_is_over_all_rows_and_none_of_rows_without_direction() -> None:
    x, y = (t.double() for t in _rows(50, 3, offset=4.0))
    x[7] = 0
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    dots = (x * y).sum(dim=1).numpy()
    expected = np.divide(dots, norms, out=np.zeros(50), where=norms > 0).mean()
    found = CosineSum(CPU)
    assert found.mean() is None
    found.add(x[7:8], y[7:8])
    assert found.mean() is None
    for part in (slice(0, 7), slice(8, 50)):
        found.add(x[part], y[part])
    assert found.mean() == pytest.approx(expected, rel=1e-12)


def test_a_row_that_differs_from_the_mean_by_its_rounding_has_no_direction() -> None:
    x = torch.tensor([[0.1, 1000.3, -7.7], [0.1, 1000.3, -7.8]])
    mean = x[0].double() * (1 + 1e-15)
    about = centred(x, mean)
    assert (about[0] == 0).all()
    np.testing.assert_array_equal(about[1], x[1].double() - mean)


def test_channels_of_one_mean_and_rows_that_do_not_vary_leave_no_variance_as_published() -> None:
    """Errors are not divided by the rounding of a mean."""
    x = torch.full((60, 7), 0.1)
    _, published = _summed(x, x + 1, reference=0.3).weighted(np.ones((1, 1))).fvu_published()
    assert published.tolist() == [0.0]
