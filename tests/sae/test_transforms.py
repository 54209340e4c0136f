"""Derivatives of an SAE by any means of torch, in any dtype, are those of its definition."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from mlsae.sae import SAE, ReLU, SAEConfig, TopK
from mlsae.sae.kernels.functions import bag, preactivations, sampled_product, transpose_product
from mlsae.sae.kernels.sparse import Support

# torch's own rules of forward derivatives are written so.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

D, N = 6, 40
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def make(kind: str) -> SAE:
    """In float64, with random biases; of relu few latents are above 0, or most."""
    architecture = TopK(4) if kind.startswith("topk") else ReLU()
    config = SAEConfig(
        d_in=D, num_latents=N, architecture=architecture, encoder_bias=kind != "topk"
    )
    generator = torch.Generator().manual_seed(0)
    sae = SAE(config, generator).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
        if sae.b_enc is not None:
            sae.b_enc.mul_(0.1).add_({"relu few": -6.0, "relu many": 4.0}.get(kind, 0.0))
    return sae


KINDS = ("topk", "topk bias", "relu few", "relu many")
every_kind = pytest.mark.parametrize("sae", [make(kind) for kind in KINDS], ids=KINDS)


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1)).double()


def dense(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """x̂ by plain products; torch differentiates those by itself."""
    m, s = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    z = ((x - m) / (s + 1e-5) - sae.b) @ sae.W_enc.T
    z = z if sae.b_enc is None else z + sae.b_enc
    k = sae.architecture.most_active or N
    z = torch.zeros_like(z).scatter(-1, z.topk(k).indices, z.topk(k).values).relu()
    return (z @ sae.W_dec + sae.b) * s + m


@every_kind
def test_the_transforms_of_torch_func_give_what_the_definition_gives(sae: SAE) -> None:
    """Jacobians both ways, a vmap over rows and over both, a directional and a second one."""
    x = rows(3)

    def loss(a: torch.Tensor) -> torch.Tensor:
        return sae(a).square().sum()

    def defined(a: torch.Tensor) -> torch.Tensor:
        return dense(sae, a).square().sum()

    for found, expected in (
        (vmap(sae)(x), dense(sae, x)),
        (vmap(sae, in_dims=1)(x.T.contiguous()), dense(sae, x)),
        (jacrev(sae)(x[0]), jacrev(lambda a: dense(sae, a))(x[0])),
        (jacfwd(sae)(x[0]), jacrev(lambda a: dense(sae, a))(x[0])),
        (vmap(jacrev(sae))(x), vmap(jacrev(lambda a: dense(sae, a)))(x)),
        (grad(loss)(x), grad(defined)(x)),
        (vmap(grad(loss))(x), grad(defined)(x)),
        (hessian(loss)(x[0]), hessian(defined)(x[0])),
        (jvp(sae, (x,), (x.cos(),))[1], jvp(lambda a: dense(sae, a), (x,), (x.cos(),))[1]),
    ):
        torch.testing.assert_close(found, expected, **CLOSE)


@every_kind
def test_gradients_for_the_weights_are_those_of_the_definition(sae: SAE) -> None:
    """By `functional_call`, of all rows and of each row; and in one direction."""
    x, weights = rows(3), dict(sae.named_parameters())

    def loss(given: dict[str, torch.Tensor], a: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = functional_call(sae, given, (a,))
        return found.square().sum()

    expected = torch.autograd.grad(dense(sae, x).square().sum(), list(weights.values()))
    by_row = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    at_once = grad(loss)(weights, x)
    along = {name: weight.detach().cos() for name, weight in weights.items()}
    _, slope = jvp(lambda given: loss(given, x), (weights,), (along,))
    for name, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(at_once[name], gradient, **CLOSE)
        torch.testing.assert_close(by_row[name].sum(0), gradient, **CLOSE)
    total = sum((g * along[n]).sum() for n, g in zip(weights, expected, strict=True))
    torch.testing.assert_close(slope, total, **CLOSE)


@pytest.mark.parametrize("kind", ["topk", "relu many"])
def test_weights_of_several_saes_are_taken_one_by_one(kind: str) -> None:
    """A vmap over stacked weights, as ensembles are computed."""
    sae, x = make(kind), rows(3)
    several = {
        name: torch.stack([weight, weight + 0.01, 1.1 * weight]).detach()
        for name, weight in sae.named_parameters()
    }
    found = vmap(lambda given: functional_call(sae, given, (x,)))(several)
    for i, each in enumerate(found):
        alone = {name: weight[i] for name, weight in several.items()}
        torch.testing.assert_close(each, functional_call(sae, alone, (x,)), **CLOSE)


@every_kind
def test_batched_gradients_of_autograd_give_the_same_jacobian(sae: SAE) -> None:
    """torch.autograd.functional.jacobian with vectorize, whose batches are of another kind."""
    x = rows(2)
    expected = jacrev(lambda a: dense(sae, a))(x)
    found = torch.autograd.functional.jacobian(sae, x, vectorize=True)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_products_can_be_differentiated_twice() -> None:
    """Finite differences agree, of first and second derivatives, with the support held fixed."""
    generator = torch.Generator().manual_seed(0)
    support = Support(torch.tensor([[0, 4], [6, 1], [4, 2]]), 7)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    def pre(u: torch.Tensor, W: torch.Tensor, b: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        values = ((u - b) @ W.T + e).gather(1, support.indices_BK)
        return preactivations(u, W, b, values.detach(), support, e)

    cases: list[tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = [
        (lambda v, W: bag(v, W, support), (leaf(3, 2), leaf(7, 4))),
        (lambda x, W: sampled_product(x, W, support), (leaf(3, 4), leaf(7, 4))),
        (lambda v, x: transpose_product(v, x, support), (leaf(3, 2), leaf(3, 4))),
        (lambda *of: pre(*of).square(), (leaf(3, 4), leaf(7, 4), leaf(4), leaf(7))),
    ]
    for function, inputs in cases:
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    for function, inputs in cases[:3]:
        assert torch.autograd.gradgradcheck(function, inputs)


@every_kind
def test_autocast_changes_nothing(sae: SAE) -> None:
    """Rows of 16 bits, as a model under autocast gives them; values, x̂ and gradients."""
    single = copy.deepcopy(sae).float()
    x = rows(9).bfloat16()
    results = []
    for on in (False, True):
        a = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            latents = single.encode(a)
            x_hat = single.decode(latents)
            wanted = (a, *single.parameters())
            gradients = torch.autograd.grad(x_hat.square().sum(), wanted)
        results.append((latents.values, latents.indices, x_hat, *gradients))
    for without, within in zip(*results, strict=True):
        assert torch.equal(without, within)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits_are_near_those_in_64(sae: SAE, dtype: torch.dtype) -> None:
    """Where the same latents are chosen; the cosine of all gradients together."""
    half = copy.deepcopy(sae).to(dtype)
    again = copy.deepcopy(half).double()
    x = rows(40).to(dtype)
    gradients = []
    for one in (half, again):
        given = x.to(one.b.dtype).detach().requires_grad_()
        one(given).double().square().mean().backward()
        found = [given.grad, *(parameter.grad for parameter in one.parameters())]
        gradients.append(torch.cat([g.double().reshape(-1) for g in found if g is not None]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
