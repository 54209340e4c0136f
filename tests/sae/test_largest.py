"""The largest values of a row by numpy's partition are those of a full sort."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mlsae.sae.kernels import select as select_module
from mlsae.sae.kernels.largest import largest, supports
from mlsae.sae.kernels.select import select


def places(pre: torch.Tensor, k: int, threads: int = 1) -> torch.Tensor:
    out = torch.full((len(pre), k), -1)
    with ThreadPoolExecutor(threads) as pool:
        largest(pre, k, pool, out)
    return out


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_largest(pre: torch.Tensor, found: torch.Tensor) -> None:
    """Right values at distinct places: with ties any choice of places is right."""
    expected = pre.sort(dim=1, descending=True).values[:, : found.shape[1]]
    assert torch.equal(pre.gather(1, found).sort(dim=1, descending=True).values, expected)
    assert all(len(set(row.tolist())) == found.shape[1] for row in found)


@pytest.mark.parametrize("num_latents", [1, 7, 64, 1024, 1040, 4096])
@pytest.mark.parametrize("k", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_are_those_of_a_full_sort(num_latents: int, k: int, dtype: torch.dtype) -> None:
    """In groups and without; bfloat16, which is full of ties, where enough values are above 0."""
    pre = rows(70, num_latents).to(dtype)
    if dtype == torch.bfloat16:
        pre = pre.abs() + 0.01
    assert_largest(pre, places(pre, min(k, num_latents)))


def test_float32_keeps_the_order_below_zero() -> None:
    """Values and infinities of both signs, and both zeros."""
    pre = -rows(20, 1024).abs()
    pre[:, 3], pre[:, 5], pre[:, 7], pre[:, 9] = torch.inf, -torch.inf, -0.0, 0.0
    found = places(pre, 12)
    assert_largest(pre, found)
    assert (found == 3).any(dim=1).all()


def test_bfloat16_takes_every_value_above_zero_before_any_other() -> None:
    """Below 0 the choice is free: a ReLU follows."""
    pre = -rows(40, 2048).abs().bfloat16()
    pre[:, 100:105] = torch.tensor([1.0, 2.0, 0.5, 3.0, 1e-30], dtype=torch.bfloat16)
    found = places(pre, 8)
    for latent in range(100, 105):
        assert (found == latent).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_does_not_depend_on_threads(dtype: torch.dtype) -> None:
    """Ties included: the same places from one, two and four threads."""
    pre = rows(300, 2048).mul(4).round().to(dtype)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(places(pre, 16, threads))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("num_latents", [2**16, 2**16 + 1, 75_000, 75_008, 131_080])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_place_is_too_large_for_the_integer_that_holds_it(
    num_latents: int, dtype: torch.dtype
) -> None:
    """Rows in full and in groups; the largest lie where a place of 16 bits would be another."""
    pre = rows(3, num_latents).to(dtype)
    pre[:, -4:] = torch.tensor([5.0, 6, 7, 8], dtype=dtype)
    found = places(pre, 4)
    assert (found.sort(dim=1).values == torch.arange(num_latents - 4, num_latents)).all()


@pytest.mark.parametrize("k", [4096, 4097])
def test_members_of_many_groups_are_more_than_16_bits_hold(k: int) -> None:
    """k · 16 candidates, which are a row of their own, from one more than 65,536 on."""
    num_latents = 16 * 4 * 4097
    pre = (torch.arange(num_latents) * 7919 % num_latents + 1).float()[None]
    order = pre.bfloat16()  # Ties by the hundred.
    for values in (pre, order):
        assert_largest(values, places(values, k))


def test_float64_is_left_to_torch() -> None:
    """There is no wider integer to hold a place beside a value."""
    assert supports(rows(2, 8))
    assert supports(torch.empty(1, (16 << 16) + 1, dtype=torch.bfloat16))
    assert not supports(rows(2, 8).double())


@pytest.mark.parametrize("num_rows", [0, 1, 100])
def test_float32_selection_equals_the_dense_product(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 7 rows, as many threads as torch has; values are those at the places."""
    monkeypatch.setattr(select_module, "BLOCK_BYTES", 4 * 1024 * 7)
    c, W = rows(num_rows, 8), rows(1024, 8, seed=1)
    values, indices = select(c, W, 4)
    pre = c @ W.T
    torch.testing.assert_close(pre.gather(1, indices), values, rtol=1e-5, atol=1e-5)
    expected = pre.sort(dim=1, descending=True).values[:, :4]
    torch.testing.assert_close(
        values.sort(dim=1, descending=True).values, expected, rtol=1e-5, atol=1e-5
    )
