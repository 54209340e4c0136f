"""The sparse steps equal dense autograd in float64: outputs and every gradient."""

import pytest
import torch

from mlsae.sae.kernels.functions import bag, preactivations
from mlsae.sae.kernels.select import select
from mlsae.sae.kernels.sparse import Support

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def leaf(*shape: int, seed: int) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_()


def dense_path(
    u: torch.Tensor, W_enc: torch.Tensor, W_dec: torch.Tensor, b: torch.Tensor, at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and reconstruction by dense tensors, given the selected places."""
    pre = (u - b) @ W_enc.T
    mask = torch.zeros_like(pre).scatter(1, at, 1.0)
    z = (pre * mask).relu()
    return z.gather(1, at), z @ W_dec + b


@pytest.mark.parametrize(
    ("num_rows", "num_latents", "k"),
    [(37, 96, 8), (1, 96, 8), (37, 20, 20), (1, 1, 1), (300, 64, 2), (5, 4096, 3)],
    ids=["usual", "one row", "k = num_latents", "all ones", "many rows", "unused latents"],
)
def test_outputs_and_gradients_equal_dense_autograd(
    num_rows: int, num_latents: int, k: int
) -> None:
    """Values, û and the gradients for u, W_enc, W_dec and b, to 1e-9."""
    d = 12
    u, W_enc = leaf(num_rows, d, seed=0), leaf(num_latents, d, seed=1)
    W_dec, b = leaf(num_latents, d, seed=2), leaf(d, seed=3)
    inputs = (u, W_enc, W_dec, b)
    pre, indices = select(u - b, W_enc, k)
    support = Support(indices, num_latents)
    values = preactivations(u, W_enc, b, pre, support).relu()
    u_hat = bag(values, W_dec, support) + b
    dense_values, dense_u_hat = dense_path(*inputs, indices)
    torch.testing.assert_close(values, dense_values, **TOLERANCE)
    torch.testing.assert_close(u_hat, dense_u_hat, **TOLERANCE)
    weights = torch.linspace(0.5, 2, num_rows, dtype=torch.float64)

    def loss(u_hat: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return ((u_hat - u).square().sum(1) * weights).sum() + (values.sqrt() + values).sum()

    values, dense_values = values + 1e-3, dense_values + 1e-3
    got = torch.autograd.grad(loss(u_hat, values), inputs)
    expected = torch.autograd.grad(loss(dense_u_hat, dense_values), inputs)
    for a, b_ in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b_, **TOLERANCE)


def test_ties_take_the_gradient_of_the_place_that_was_chosen() -> None:
    """Two equal encoder rows: whichever is selected is the one that learns."""
    u = leaf(20, 6, seed=0).detach()
    half = leaf(8, 6, seed=1).detach()
    W_enc = torch.cat([half, half]).requires_grad_()
    W_dec, b = leaf(16, 6, seed=2), leaf(6, seed=3)
    pre, indices = select(u - b, W_enc, 3)
    support = Support(indices, 16)
    values = preactivations(u, W_enc, b, pre, support).relu()
    got = torch.autograd.grad((bag(values, W_dec, support) + b).square().sum(), (W_enc, W_dec, b))
    _, u_hat = dense_path(u, W_enc, W_dec, b, indices)
    expected = torch.autograd.grad(u_hat.square().sum(), (W_enc, W_dec, b))
    for a, b_ in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b_, **TOLERANCE)


def test_gradcheck() -> None:
    """Finite differences agree, with the support held fixed."""
    u, W_enc, W_dec, b = leaf(4, 3, seed=0), leaf(9, 3, seed=1), leaf(9, 3, seed=2), leaf(3, seed=3)
    indices = torch.tensor([[0, 4], [8, 1], [4, 2], [3, 0]])
    support = Support(indices, 9)

    def both(
        u: torch.Tensor, W_enc: torch.Tensor, W_dec: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        pre = ((u - b) @ W_enc.T).gather(1, indices)
        return bag(preactivations(u, W_enc, b, pre.detach(), support), W_dec, support)

    assert torch.autograd.gradcheck(both, (u, W_enc, W_dec, b))


def test_the_transpose_product_does_not_depend_on_the_number_of_threads() -> None:
    """Bit for bit: a latent's rows are summed in their own order."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(500, 64, generator=generator).argsort(dim=1)[:, :8]
    values, dense = (
        torch.rand(500, 8, generator=generator),
        torch.rand(500, 16, generator=generator),
    )
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(Support(indices, 64).transpose_product(values, dense))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
