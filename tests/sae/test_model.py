"""The SAE as a whole: definitions, shapes, and what it refuses."""

import numpy as np
import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.sae.normalize import restore, standardize


def make(d_in: int = 8, num_latents: int = 32, k: int = 4) -> SAE:
    config = SAEConfig(d_in=d_in, num_latents=num_latents, architecture=TopK(k))
    sae = SAE(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b.copy_(torch.linspace(-1, 1, d_in))
    return sae


def test_standardize_is_the_published_formula() -> None:
    """u = (x − m) / (s + 1e-5) with the unbiased s, against numpy in float64."""
    x = np.random.default_rng(0).normal(3, 50, (7, 5))
    u, mean, scale = standardize(torch.from_numpy(x))
    m, s = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(u.numpy(), (x - m) / (s + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(restore(u, mean, scale).numpy(), u.numpy() * s + m, rtol=1e-12)


def test_a_constant_row_encodes_without_nan() -> None:
    """A row without spread becomes û = reconstruct(0) scaled by 0: its mean."""
    x_hat = make()(torch.full((1, 8), 3.0))
    assert torch.equal(x_hat, torch.full((1, 8), 3.0))


def test_forward_equals_the_definition() -> None:
    """z = ReLU(TopK(W_enc (u − b))), x̂ = (W_dec z + b) s + m, against numpy in float64."""
    sae = make().double()
    x = np.random.default_rng(1).normal(2, 9, (11, 8))
    W_enc, W_dec, b = (p.detach().numpy() for p in (sae.W_enc, sae.W_dec, sae.b))
    m, s = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    pre = ((x - m) / (s + 1e-5) - b) @ W_enc.T
    z = np.where(pre >= np.sort(pre, axis=1)[:, -4:-3], np.maximum(pre, 0), 0)
    expected = (z @ W_dec + b) * s + m
    np.testing.assert_allclose(sae(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-9)
    latents = sae.encode(torch.from_numpy(x))
    dense = np.zeros_like(z)
    np.put_along_axis(dense, latents.indices.numpy(), latents.values.detach().numpy(), axis=1)
    np.testing.assert_allclose(dense, z, rtol=1e-9)


def test_its_representation_is_one_line() -> None:
    """Size, architecture, normalisation and dtype."""
    assert repr(make()) == (
        "SAE(32 latents of 8 channels, k 4, normalize standardize, torch.float32)"
    )


def test_any_leading_shape_and_dtype() -> None:
    """(B, T, d) and float16 rows give what flat float32 rows give."""
    sae = make()
    x = torch.randn(3, 5, 8).half()
    latents = sae.encode(x)
    assert latents.values.shape == latents.indices.shape == (3, 5, 4)
    assert latents.mean.shape == latents.scale.shape == (3, 5, 1)
    flat = sae.encode(x.float().reshape(15, 8))
    assert torch.equal(latents.values.reshape(15, 4), flat.values)
    assert torch.equal(sae(x).reshape(15, 8), sae.decode(flat))
    assert sae(x[0, 0]).shape == (8,)


def test_no_rows_give_no_rows() -> None:
    """An empty batch is no special case for the caller."""
    assert make()(torch.zeros(0, 8)).shape == (0, 8)


def test_decoder_rows_start_as_unit_encoder_rows() -> None:
    """W_dec = W_encᵀ with unit rows; the seed decides both."""
    sae = make()
    norms = sae.W_enc.norm(dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec, sae.W_enc / norms)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert torch.equal(sae.W_enc, make().W_enc)


def test_rows_of_another_width_are_refused() -> None:
    """Both widths are named."""
    with pytest.raises(InputError, match=r"rows of 9 channels do not fit this SAE: expected 8"):
        make().encode(torch.zeros(2, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": TopK(33)}, r"k must be at most num_latents: got k 33 and 32 latents"),
        ({"architecture": TopK(0)}, r"k must be a whole number of at least 1, got 0"),
        ({"num_latents": 2.5}, r"num_latents must be a whole number of at least 1, got 2\.5"),
        ({"architecture": "topk"}, r"architecture must be an Architecture, such as TopK\(k=32\)"),
        ({"d_in": 1}, r"d_in must be at least 2 to standardise a row"),
        (
            {"normalize": "layer"},
            r"normalize must be one of standardize, none, scale, center, got 'layer'",
        ),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, object], message: str) -> None:
    """The value, and what would do, are named."""
    values: dict[str, object] = {
        "d_in": 8,
        "num_latents": 32,
        "architecture": TopK(4),
        **change,
    }
    with pytest.raises(InputError, match=message):
        SAEConfig(**values)  # type: ignore[arg-type]
