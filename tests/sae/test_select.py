"""Selection is exact: the k largest pre-activations of every row, whatever the blocks."""

from collections.abc import Callable

import pytest
import torch

from mlsae.sae.kernels import select as module
from mlsae.sae.kernels.select import select, select_mixed, select_screened, top_k


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_largest(pre: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, k: int) -> None:
    """Right values at distinct places: with ties any choice of places is right."""
    expected = pre.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(values.sort(dim=1, descending=True).values, expected)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)


@pytest.mark.parametrize("num_latents", [1, 7, 64, 1024, 1040])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_top_k_equals_a_full_sort(num_latents: int, k: int) -> None:
    """Both the plain and the two-stage selection give the k largest of a full sort."""
    k = min(k, num_latents)
    pre = rows(33, num_latents)
    values, indices = top_k(pre, k)
    assert_largest(pre, values, indices, k)


def test_top_k_takes_any_of_equal_values() -> None:
    """Integers collide all the time; the selected values are still those of a full sort."""
    pre = rows(50, 1024).mul(2).round()
    assert pre.unique().numel() < 30
    values, indices = top_k(pre, 16)
    assert_largest(pre, values, indices, 16)


def test_top_k_of_a_row_whose_largest_share_a_group() -> None:
    """All the k largest lie in one group of the two-stage selection."""
    pre = rows(1, 1024).clamp(max=3)
    pre[0, 5::64] = torch.arange(10.0, 26.0, dtype=torch.float64)
    values, indices = top_k(pre, 16)
    assert set(indices[0].tolist()) == set(range(5, 1024, 64))
    assert_largest(pre, values, indices, 16)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 100])
def test_select_equals_the_dense_product_in_any_number_of_blocks(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are taken in blocks; no row is lost or doubled at their edges."""
    c, W = rows(num_rows, 8), rows(48, 8, seed=1)
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * 48 * 7)
    values, indices = select(c, W, 4)
    pre = c @ W.T
    expected = pre.sort(dim=1, descending=True).values[:, :4]
    torch.testing.assert_close(pre.gather(1, indices), values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        values.sort(dim=1, descending=True).values, expected, rtol=1e-12, atol=1e-12
    )


def test_mixed_selection_agrees_with_the_exact_one_and_has_exact_values() -> None:
    """At least 99.9% of the pairs agree, and a value is the float32 dot product of its pair."""
    c, W = rows(512, 64, dtype=torch.float32), rows(1024, 64, seed=1, dtype=torch.float32) / 8
    _, exact = select(c, W, 16)
    values, indices = select_mixed(c, W, 16)
    agreeing = (exact[:, :, None] == indices[:, None, :]).any(dim=2).double().mean()
    assert agreeing >= 0.999
    torch.testing.assert_close((c @ W.T).gather(1, indices), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_latents", [2**16 + 1, 75_000, 75_008])
@pytest.mark.parametrize("way", [select, select_mixed, select_screened])
def test_more_latents_than_16_bits_number_are_selected_exactly(
    num_latents: int, way: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """By every way; the largest are far apart, and some of them last."""
    W = rows(num_latents, 8, dtype=torch.float32) / 8
    c = rows(5, 8, seed=1, dtype=torch.float32)
    places = torch.arange(num_latents - 4, num_latents)
    W[places] = torch.linspace(4, 5, 4)[:, None] * c[0]
    values, indices = way(c, W, 4)
    assert set(indices[0].tolist()) == set(places.tolist())
    torch.testing.assert_close((c @ W.T).gather(1, indices), values, rtol=1e-5, atol=1e-4)
    exact = (c @ W.T).topk(4, dim=1).values.sort(dim=1).values
    torch.testing.assert_close(values.sort(dim=1).values, exact, rtol=1e-4, atol=1e-4)
