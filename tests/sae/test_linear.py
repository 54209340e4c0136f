"""The linear form: one product for every normalisation and architecture, with its gradients."""

from typing import Any

import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.sae import SAE, SAEConfig
from mlsae.sae.architectures import ArchitectureSettings, registered
from mlsae.sae.architectures.base import Architecture

D, N, LAYERS = 12, 40, (2, 5, 9)
STATE: dict[str, dict[str, Any]] = {
    "standardize": {},
    "none": {"normalize": "none"},
    "scale": {"normalize": "scale", "layers": LAYERS},
    "center": {"normalize": "center", "layers": LAYERS},
    "layer_scale": {"normalize": "none", "layer_scale": "log", "layers": LAYERS},
}
PSEUDO_LATENTS = {
    "standardize": ("scale", "mean"),
    "none": ("scale",),
    "scale": ("scale",),
    "center": ("scale", "layer 2", "layer 5", "layer 9"),
    "layer_scale": ("scale",),
}
DTYPES = ((torch.float32, 1e-6), (torch.float64, 1e-12))


def make(kind: type[Architecture], state: str, dtype: torch.dtype = torch.float64) -> SAE:
    """An SAE with every parameter and all state of layers drawn."""
    architecture = kind.wanted(ArchitectureSettings(architecture=kind.name, k=5))
    config = SAEConfig(d_in=D, num_latents=N, architecture=architecture, **STATE[state])
    sae = SAE(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*sae.parameters(), sae.layer_shift):
            if tensor is not None:
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 3)
        if sae.layer_factor is not None:
            sae.layer_factor.copy_(torch.tensor([0.1, 1.5, 40]))
    return sae.to(dtype)


def rows(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (L, 7, D) of different spread and mean, and their layers (L, 1)."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 7, D, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([0.5, 4.0, 20.0])[:, None, None] + torch.linspace(-3, 5, 7)[:, None]
    x[1, 3] = 0.0
    return x.to(dtype), torch.tensor(LAYERS)[:, None]


cases = pytest.mark.parametrize("state", STATE)
kinds = pytest.mark.parametrize("kind", registered(), ids=lambda kind: kind.name)


@cases
@kinds
def test_a_product_is_the_reconstruction(kind: type[Architecture], state: str) -> None:
    """f · D by itself, by decode, and by the module, at 32 and 64 bits."""
    for dtype, close in DTYPES:
        sae, (x, layer) = make(kind, state, dtype), rows(dtype)
        form, expected = sae.linear(), sae(x, layer)
        f = form.encode(x, layer)
        assert form.pseudo_latents == PSEUDO_LATENTS[state]
        assert f.shape == (3, 7, N + len(form.pseudo_latents))
        assert form.W_dec.shape == (f.shape[-1], D)
        bound = close * expected.abs().amax()
        for found in (f @ form.W_dec, form.decode(f), form(x, layer)):
            assert found.dtype == dtype
            assert (found - expected).abs().amax() < bound


@cases
@kinds
def test_features_are_latents_in_units_of_the_row(kind: type[Architecture], state: str) -> None:
    """The first N are s z; zeroing one takes s z_j W_dec,j from the reconstruction."""
    sae, (x, layer) = make(kind, state), rows()
    form, latents = sae.linear(), sae.encode(x, layer)
    f = form.encode(x, layer)
    expected = torch.zeros(3, 7, N, dtype=x.dtype)
    expected.scatter_(-1, latents.indices, latents.values * latents.scale)
    assert torch.equal(f[..., : form.num_latents], expected)
    assert (expected[0] != 0).any()
    strongest = int(expected.abs().sum((0, 1)).argmax())
    without = f.clone()
    without[..., strongest] = 0
    values = torch.where(latents.indices == strongest, 0, latents.values)
    torch.testing.assert_close(form.decode(without), sae.decode(latents._replace(values=values)))


@cases
@kinds
def test_gradients_are_those_of_the_sae(kind: type[Architecture], state: str) -> None:
    """For rows and for every parameter, by the product with W_dec and by decode."""
    sae, (x, layer) = make(kind, state), rows()
    x[1, 3] = 1e-3 * torch.linspace(-1, 1, D) ** 2  # The deviation has no derivative at 0.
    x.requires_grad_()
    trained = [p for p in sae.parameters() if p.requires_grad]
    form, inputs = sae.linear(), (x, *trained)
    towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)

    def gradients(x_hat: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad((x_hat * towards).sum(), inputs, allow_unused=True)

    expected = gradients(sae(x, layer))
    for x_hat in (form(x, layer), form.encode(x, layer) @ form.W_dec):
        for found, gradient in zip(gradients(x_hat), expected, strict=True):
            if gradient is None:
                assert found is None
            else:
                torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)
    assert expected[0] is not None
    assert expected[0].abs().sum() > 0


def test_it_keeps_nothing_from_row_to_row() -> None:
    """Two inputs are encoded before either is decoded, and one is decoded twice."""
    sae, (x, layer) = make(registered()[0], "standardize"), rows()
    form = sae.linear()
    first, second = form.encode(x[0], layer[0]), form.encode(x[2], layer[2])
    for _ in range(2):
        torch.testing.assert_close(form.decode(second), sae(x[2]))
        torch.testing.assert_close(form.decode(first), sae(x[0]))


def test_one_layer_for_all_rows() -> None:
    """A number, as `SAE.encode` takes it."""
    sae, (x, _) = make(registered()[0], "center"), rows()
    torch.testing.assert_close(sae.linear()(x, 5), sae(x, 5))


def test_autocast_changes_nothing() -> None:
    """The product is taken in the dtype of the SAE."""
    sae, (x, _) = make(registered()[0], "standardize", torch.float32), rows(torch.float32)
    form = sae.linear()
    expected = form(x)
    with torch.autocast("cpu"):
        assert torch.equal(form(x), expected)


def test_parameters_are_shared() -> None:
    """A change of the SAE is one of its form."""
    sae = make(registered()[0], "none")
    form, (x, _) = sae.linear(), rows()
    with torch.no_grad():
        sae.b.add_(1)
    torch.testing.assert_close(form(x), sae(x))


def test_its_text_says_how_many_latents_are_features() -> None:
    form = make(registered()[0], "standardize").linear()
    assert "LinearForm(\n  40 latents and 2 pseudo-latents (scale, mean)" in repr(form)


def test_what_it_refuses() -> None:
    """A layer that is missing or unknown, rows and codes of another width."""
    form, (x, layer) = make(registered()[0], "center").linear(), rows()
    for call, message in (
        (lambda: form.encode(x), "give the layer of the rows"),
        (lambda: form.encode(x, 3), "this SAE has layers 2, 5, 9, got 3"),
        (lambda: form.encode(x[..., 1:], layer), "rows of 11 channels do not fit this SAE"),
        (
            lambda: form.decode(x.new_zeros(2, N)),
            r"40 latents and 4 pseudo-latents \(scale, layer 2, layer 5, layer 9\) decodes rows of "
            "44, got 40",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()
