"""Selection by group, against sorting all entries of rows × latents."""

from collections.abc import Callable, Sequence

import pytest
import torch

from mlsae.sae.kernels import budget
from mlsae.sae.kernels.budget import Kept, plain, screened, select_by_group
from mlsae.sae.kernels.sparse import Entries, Support

Select = Callable[[torch.Tensor, torch.Tensor, int, Sequence[int]], Kept]
ways = pytest.mark.parametrize("select", [plain, screened])


def drawn(rows: int, d_in: int, latents: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(rows, d_in, generator=generator)
    return c, torch.randn(latents, d_in, generator=generator) / d_in**0.5


def sorted_entries(
    c: torch.Tensor, W: torch.Tensor, k: int, sizes: Sequence[int]
) -> list[tuple[int, int]]:
    """Rows and latents by definition: larger first, then earlier rows, then earlier latents."""
    pre, found, start = c @ W.T, [], 0
    for size in sizes:
        values, order = pre[start : start + size].reshape(-1).sort(descending=True, stable=True)
        kept = order[: min(k * size, int((values > 0).sum()))].sort().values
        found += [(start + at // len(W), at % len(W)) for at in kept.tolist()]
        start += size
    return found


def places(kept: Kept) -> list[tuple[int, int]]:
    return list(zip(kept.rows.tolist(), kept.latents.tolist(), strict=True))


@ways
@pytest.mark.parametrize("sizes", [[48], [16, 0, 1, 31], [3] * 16])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_they_are_the_largest_of_each_group(select: Select, sizes: list[int], k: int) -> None:
    """With groups of one row and of none, and with budgets beyond the values above 0."""
    c, W = drawn(48, 16, 100)
    kept = select(c, W, k, sizes)
    assert places(kept) == sorted_entries(c, W, k, sizes)
    torch.testing.assert_close(kept.values, (c @ W.T)[kept.rows, kept.latents])


@ways
def test_equal_values_go_to_earlier_rows_and_latents(select: Select) -> None:
    """Eight of each, so that an odd budget cuts through them."""
    c, W = drawn(8, 16, 32)
    c, W = torch.cat([c, c])[:15], torch.cat([W, W]).repeat_interleave(2, dim=0)
    for k in (1, 3, 7):
        assert places(select(c, W, k, [15])) == sorted_entries(c, W, k, [15])


@ways
def test_rows_without_a_value_above_0_have_no_entry(select: Select) -> None:
    """One row is 0, one has every product below 0, and a whole group is 0."""
    c, W = drawn(24, 8, 40)
    W = W.abs()
    c[3], c[5], c[16:] = 0, -1, 0
    kept = select(c, W, 6, [16, 8])
    assert places(kept) == sorted_entries(c, W, 6, [16, 8])
    assert not {3, 5, *range(16, 24)} & set(kept.rows.tolist())


@ways
def test_no_row_decides_for_the_others(select: Select, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come in blocks of two; the first are far larger, or far smaller, than the rest."""
    monkeypatch.setattr(budget, "BLOCK_BYTES", 2 * 200 * 4)
    c, W = drawn(40, 16, 200)
    for factor in (1e3, 1e-3, 0.0):
        c[:6] *= factor
        assert places(select(c, W, 4, [30, 10])) == sorted_entries(c, W, 4, [30, 10])


def test_large_products_are_screened_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a processor is fast in bfloat16, and in float64, which is not screened."""
    monkeypatch.setattr(budget, "has_fast_bfloat16", lambda: True)
    c, W = drawn(512, 128, 4096)
    sizes = [200, 312]
    found = select_by_group(c, W, 8, sizes)
    assert places(found) == places(plain(c, W, 8, sizes))
    exact = select_by_group(c.double(), W.double(), 8, sizes)
    assert places(exact) == sorted_entries(c.double(), W.double(), 8, sizes)
    assert len(select_by_group(c[:0], W, 8, []).values) == 0


def test_products_at_entries_are_those_of_the_dense_matrix() -> None:
    """All three, and by range of latents, with rows of no entry at both ends and between."""
    rows = torch.tensor([1, 1, 1, 3, 4, 4])
    latents = torch.tensor([0, 4, 9, 5, 2, 8])
    values = torch.randn(6, dtype=torch.float64)
    x, W = torch.randn(6, 3, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    Z = torch.zeros(6, 10, dtype=torch.float64)
    Z[rows, latents] = values
    entries = Entries.of_rows(rows, latents, 6, 10)
    assert entries.rows.tolist() == rows.tolist()
    torch.testing.assert_close(entries.product(values, W), Z @ W)
    torch.testing.assert_close(entries.transpose_product(values, x), Z.T @ x)
    torch.testing.assert_close(entries.sampled_product(x, W), (x @ W.T)[rows, latents])
    widths = (2, 5, 10)
    of_parts, parts = entries.nested(values, widths)
    expected = torch.stack([Z[:, :2] @ W[:2], Z[:, 2:5] @ W[2:5], Z[:, 5:] @ W[5:]], dim=1)
    torch.testing.assert_close(parts.product(of_parts, W).view(6, 3, 3), expected)
    counts = torch.stack([(Z[:, :width] != 0).sum(1) for width in widths], dim=1)
    assert torch.equal(entries.counts(values != 0, widths), counts)
    # Lists of one length, in no order, have the same parts.
    order = torch.argsort(torch.rand(6, 10), dim=1)
    lists, listed = Support(order, 10), Z.gather(1, order)
    of_parts, parts = lists.nested(listed, widths)
    torch.testing.assert_close(parts.product(of_parts, W).view(6, 3, 3), expected)
    assert torch.equal(lists.counts(listed != 0, widths), counts)


def test_nothing_is_active_in_a_batch_without_entries() -> None:
    """Sums are 0, and so are gradients."""
    none = torch.zeros(0, dtype=torch.int64)
    entries = Entries.of_rows(none, none, 4, 10)
    W, x = torch.ones(10, 3), torch.ones(4, 3)
    assert torch.equal(entries.product(torch.zeros(0), W), torch.zeros(4, 3))
    assert torch.equal(entries.transpose_product(torch.zeros(0), x), torch.zeros(10, 3))
    assert len(entries.sampled_product(x, W)) == 0
