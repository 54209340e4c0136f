"""The one inference form z = a · [a > θ], whatever θ is one for."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.func import jacrev, vmap

from mlsae.base.errors import InputError
from mlsae.sae import SAE, Architecture, SAEConfig, load
from mlsae.sae.architectures import base, register
from mlsae.sae.architectures.base import Parameter, Shape, Weights
from mlsae.sae.kernels import above as kernel
from mlsae.sae.kernels.above import above, of_rows
from mlsae.sae.kernels.sparse import FullSupport, Support

D, N, B = 6, 64, 11
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@dataclass(frozen=True)
class ByLayer(Architecture):
    """θ of each layer, which no gradient changes."""

    name = "bylayer"
    summary = "above its layer's threshold"
    settings = object

    @classmethod
    def wanted(cls, settings: object) -> "ByLayer":  # noqa: ARG003
        return cls()

    @property
    def depends_on_layer(self) -> bool:
        return True

    @property
    def most_active(self) -> None:
        return None

    def parameters(self, shape: Shape) -> tuple[Parameter, ...]:
        of = (len(shape.layers or ()),)
        threshold = Parameter(
            name="threshold", shape=of, by_latent=False, trained=False, float32=True
        )
        return (*super().parameters(shape), threshold)

    def activate(
        self, u_BD: torch.Tensor, weights: Weights, at: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, Support]:
        assert at is not None
        threshold = of_rows(weights["threshold"], at)
        return above(u_BD, weights["W_enc"], weights["b"], threshold=threshold)


def thresholds(level: float) -> list[torch.Tensor | None]:
    """None, and θ of each shape: among those by row and by latent some below 0."""
    generator = torch.Generator().manual_seed(1)
    by_row = level + torch.randn(B, 1, generator=generator, dtype=torch.float64)
    by_latent = level + torch.randn(N, generator=generator, dtype=torch.float64)
    return [None, torch.tensor(level, dtype=torch.float64), by_row, by_latent]


def tensors() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, D), (N, D), (D,), (N,))
    return tuple(
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )


@pytest.mark.parametrize("block", [kernel.BLOCK_BYTES, 4 * N * 8], ids=["one block", "blocks"])
@pytest.mark.parametrize("level", [0.3, 5.0, 100.0], ids=["many", "few", "none"])
@pytest.mark.parametrize("which", range(4), ids=["none", "one", "by row", "by latent"])
def test_values_and_gradients_are_those_of_the_definition(
    which: int, level: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense in float64, an entry equal to its θ left out; both ways of multiplying are taken."""
    monkeypatch.setattr(kernel, "BLOCK_BYTES", block)
    given = tensors()
    u, W, b, b_enc = given
    a = ((u - b) @ W.T + b_enc).relu()
    theta = thresholds(level)[which]
    if theta is not None:
        # Equality is exact for one entry at least.
        exact = torch.addmm(b_enc, u[:3] - b, W.T).detach()
        theta = theta.clone()
        theta[(2, 0) if which == 2 else 5 if which == 3 else ()] = exact[2, 5]
    values, support = above(u, W, b, b_enc, theta)
    z = a * (a > (0 if theta is None else theta))
    found = torch.zeros(B, N, dtype=torch.float64).scatter(1, support.indices_BK, values)
    torch.testing.assert_close(found, z, **CLOSE)
    if theta is not None and a[2, 5] > 0:
        assert found[2, 5] == 0
    weight = torch.linspace(-1, 1, N, dtype=torch.float64)
    expected = torch.autograd.grad((z * weight).sum(), given)
    gradients = torch.autograd.grad((found * weight).sum(), given)
    for mine, dense in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, dense, **CLOSE)
    assert isinstance(support, FullSupport) == (support.indices_BK.shape[1] == N)


def test_no_row_is_no_special_case() -> None:
    """With θ of rows, too."""
    _, W, b, _ = tensors()
    values, support = above(torch.zeros(0, D).double(), W, b, threshold=torch.zeros(0, 1).double())
    assert values.shape == support.indices_BK.shape
    assert len(values) == 0


@pytest.fixture
def by_layer(monkeypatch: pytest.MonkeyPatch) -> SAE:
    monkeypatch.setattr(base, "_registered", dict(base._registered))
    register(ByLayer)
    config = SAEConfig(d_in=D, num_latents=N, architecture=ByLayer(), layers=(3, 8))
    sae = SAE(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.get_parameter("threshold").copy_(torch.tensor([0.2, 1.2]))
    return sae


def test_a_threshold_by_layer_takes_the_layer_of_each_row(by_layer: SAE, tmp_path: Path) -> None:
    """One layer, several, and after save and load; refused without, as another layer is."""
    x = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(2))
    both = [by_layer.encode(x, layer).values for layer in (3, 8)]
    assert (both[0] != 0).sum() > (both[1] != 0).sum() > 0
    mixed = torch.tensor([3, 8, 3])
    expected = torch.stack([by_layer(x[:, i], int(mixed[i])) for i in range(3)], dim=1)
    torch.testing.assert_close(by_layer(x, mixed), expected)
    by_layer.save(tmp_path, {})
    again = load(tmp_path)
    assert torch.equal(again(x, mixed), by_layer(x, mixed))
    assert not again.get_parameter("threshold").requires_grad
    with pytest.raises(InputError, match="encodes the rows of each layer by themselves: give"):
        by_layer.encode(x)
    with pytest.raises(InputError, match="this SAE has layers 3, 8, got 4"):
        by_layer.encode(x, 4)
    with pytest.raises(InputError, match="with architecture bylayer, normalize standardize"):
        SAEConfig(d_in=D, num_latents=N, architecture=ByLayer())


def test_transforms_take_each_row_with_its_threshold(by_layer: SAE) -> None:
    """A vmap over rows and over their layers, and of derivatives."""
    sae = by_layer.double()
    u = torch.randn(4, D, generator=torch.Generator().manual_seed(3)).double()
    at = torch.tensor([0, 1, 1, 0])

    def x_hat(row: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        return sae.reconstruct(*sae.activate(row[None], layer[None]))[0]

    expected = sae.reconstruct(*sae.activate(u, at))
    torch.testing.assert_close(vmap(x_hat)(u, at), expected)
    slopes = torch.stack([jacrev(x_hat)(u[i], at[i]) for i in range(4)])
    torch.testing.assert_close(vmap(jacrev(x_hat))(u, at), slopes)


def test_an_sae_in_16_bits_keeps_its_thresholds(by_layer: SAE) -> None:
    """bfloat16 has 8 bits: 0.2 would be 0.2002; float64 is float64."""
    exact = by_layer.get_parameter("threshold").detach().clone()
    half = by_layer.to(torch.bfloat16)
    assert half.W_enc.dtype == torch.bfloat16
    assert torch.equal(half.get_parameter("threshold"), exact)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(4))
    assert half.encode(x, torch.tensor([3, 8, 8, 3, 3])).values.dtype == torch.bfloat16
    assert half.double().get_parameter("threshold").dtype == torch.float64
