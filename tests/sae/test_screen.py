"""Screening by a bfloat16 product loses none of the k largest, however much alike they are."""

from collections.abc import Callable

import pytest
import torch

from mlsae.sae.kernels import select as module
from mlsae.sae.kernels.screen import Screen
from mlsae.sae.kernels.select import select, select_screened

K = 8


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(c: torch.Tensor, W: torch.Tensor) -> None:
    """As they are."""


def scaled_channels(c: torch.Tensor, W: torch.Tensor) -> None:  # noqa: ARG001
    """A channel a hundred times as large as the others."""
    c[:, 3] *= 100


def unequal_directions(c: torch.Tensor, W: torch.Tensor) -> None:  # noqa: ARG001
    """Lengths from 1/20 to 20."""
    W *= torch.exp(normal(len(W), 1, seed=5))


def alike(c: torch.Tensor, W: torch.Tensor) -> None:
    """Half of the directions are one but for a ten-thousandth: bfloat16 cannot tell them apart."""
    c += 10 * W[:1]
    W[::2] = W[:1] * (1 + 1e-4 * normal(len(W[::2]), 1, seed=5))


def few_above_zero(c: torch.Tensor, W: torch.Tensor) -> None:
    """Five positive products a row."""
    c.abs_()
    W.abs_().neg_()
    W[100:105] *= -1


def hardly_above_zero(c: torch.Tensor, W: torch.Tensor) -> None:
    """Forty products just above 0, half of which bfloat16 takes for none; the rest is below."""
    c[:] = 1
    wanted = torch.full((len(W), 1), -0.05)
    wanted[40:80] = torch.linspace(2e-4, 1e-3, 40)[:, None]
    W += (wanted - W.sum(dim=1, keepdim=True)) / W.shape[1]


def tiny(c: torch.Tensor, W: torch.Tensor) -> None:
    """Numbers that a processor may take for 0, and products that are none."""
    c *= 1e-39
    W *= 1e6


def huge(c: torch.Tensor, W: torch.Tensor) -> None:
    """Squares overflow, products do not."""
    c *= 1e25
    W *= 1e10


def mixed(c: torch.Tensor, W: torch.Tensor) -> None:  # noqa: ARG001
    """Rows of all sizes, zeros among them."""
    c *= 10.0 ** torch.randint(-6, 7, (len(c), 1), generator=torch.Generator().manual_seed(1))
    c[::7] = 0


every_kind = pytest.mark.parametrize(
    "kind",
    [
        plain,
        scaled_channels,
        unequal_directions,
        alike,
        few_above_zero,
        hardly_above_zero,
        tiny,
        huge,
        mixed,
    ],
    ids=lambda kind: kind.__name__,
)
Kind = Callable[[torch.Tensor, torch.Tensor], None]


def made(kind: Kind, num_rows: int, d_in: int, num_latents: int) -> tuple[torch.Tensor, ...]:
    c, W = normal(num_rows, d_in), normal(num_latents, d_in, seed=1) / d_in**0.5
    kind(c, W)
    return c, W


@every_kind
@pytest.mark.parametrize("d_in", [8, 300])
def test_no_product_is_more_than_what_was_said(kind: Kind, d_in: int) -> None:
    """Every row with every direction, against float64 and float32's own value."""
    c, W = made(kind, 40, d_in, 500)
    screen, c16 = Screen(W), c.bfloat16()
    seen = c16 @ screen.W_ND.T
    exact = c.double() @ W.double().T
    for j in range(len(W)):
        most = screen.most(c, c16, seen[:, j])
        assert (exact[:, j] <= most).all()
        assert ((c * W[j]).sum(dim=1) <= most).all()


def test_what_was_said_is_near() -> None:
    """Within half of a row's spread: else every row would have to be done again."""
    c, W = made(plain, 40, 512, 500)
    screen, c16 = Screen(W), c.bfloat16()
    seen = (c16 @ screen.W_ND.T)[:, 0]
    assert (screen.most(c, c16, seen) - seen.float() < 0.1 * (c @ W.T).std(dim=1)).all()


@every_kind
@pytest.mark.parametrize("num_rows", [0, 1, 700, 1500])
def test_the_k_largest_are_found(kind: Kind, num_rows: int) -> None:
    """Against a sort of the float64 product, after the ReLU that follows."""
    c, W = made(kind, num_rows, 48, 2048)
    values, indices = select_screened(c, W, K)
    exact = c.double() @ W.double().T
    expected = exact.sort(dim=1, descending=True).values[:, :K].relu()
    off = (
        1e-6
        * torch.linalg.vector_norm(c.double(), dim=1, keepdim=True)
        * W.double().norm(dim=1).max()
    )
    found = exact.gather(1, indices).sort(dim=1, descending=True).values.relu()
    assert ((found - expected).abs() <= off).all()
    assert ((values - exact.gather(1, indices)).abs() <= off).all()
    assert all(len(set(row)) == K for row in indices.tolist())


@pytest.mark.parametrize(("kind", "few"), [(plain, True), (scaled_channels, True), (alike, False)])
def test_few_rows_are_done_again(kind: Kind, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where directions are alike, all are, and the rest is not even tried."""
    counts = {torch.float32: 0, torch.bfloat16: 0}
    plainly = module._select

    def count(c: torch.Tensor, W: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts[c.dtype] += len(c)
        return plainly(c, W, k)

    monkeypatch.setattr(module, "_select", count)
    select_screened(*made(kind, 3000, 48, 2048), K)
    if few:
        assert counts[torch.bfloat16] == 3000
        assert counts[torch.float32] < 300
    else:
        assert counts == {torch.bfloat16: 1024, torch.float32: 3000}


def test_a_row_that_is_no_number_comes_as_ever() -> None:
    """Infinities and NaNs are nothing that can be screened, and spoil no other row."""
    c, W = made(plain, 300, 48, 2048)
    sound = select_screened(c, W, K)
    c[7, 0], c[9, 1] = torch.inf, torch.nan
    values, indices = select_screened(c, W, K)
    others = torch.ones(300, dtype=torch.bool)
    others[[7, 9]] = False
    assert torch.equal(indices[others], sound[1][others])
    assert values[7].max() == torch.inf
    assert values[9].isnan().all()


def test_select_screens_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are equal with and without; the product in bfloat16 is of this machine."""
    c, W = made(plain, 600, 256, 2048)
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda: False)
    _, without = select(c, W, K)
    screened = []
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(
        module,
        "select_screened",
        lambda *args: screened.append(args) or select_screened(*args),
    )
    _, found = select(c, W, K)
    assert len(screened) == 1
    assert torch.equal(found.sort(dim=1).values, without.sort(dim=1).values)
    for few in ((c[:200], W, K), (c, W[:1024], K), (c, W, 64), (c.double(), W.double(), K)):
        select(*few)
    assert len(screened) == 1
