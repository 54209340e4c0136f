"""The relu architecture: its latents as lists, its definition, its directory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.sae import SAE, ReLU, SAEConfig, load
from mlsae.sae.kernels import above
from mlsae.sae.kernels.listed import listed

D, N = 8, 40


def make(bias: float = -0.3) -> SAE:
    config = SAEConfig(d_in=D, num_latents=N, architecture=ReLU(), encoder_bias=True)
    sae = SAE(config, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        sae.b.copy_(torch.linspace(-1, 1, D))
        assert sae.b_enc is not None
        sae.b_enc.fill_(bias)
        sae.W_dec.mul_(3)
    return sae


def dense(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Z = ReLU(W_enc (u − b) + b_enc) and x̂ = (W_dec z + b) s + m, written out."""
    m, s = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    assert sae.b_enc is not None
    z = (((x - m) / (s + 1e-5) - sae.b) @ sae.W_enc.T + sae.b_enc).relu()
    return z.detach(), ((z @ sae.W_dec + sae.b) * s + m).detach()


@pytest.mark.parametrize("bias", [-100.0, -1.5, -0.3, 100.0], ids=["none", "few", "some", "all"])
@pytest.mark.parametrize("block", [above.BLOCK_BYTES, 8 * N * 4], ids=["one block", "blocks"])
def test_encode_and_decode_equal_the_definition(
    bias: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64; K is the largest number of active latents, each index once a row."""
    monkeypatch.setattr(above, "BLOCK_BYTES", block)
    sae = make(bias)
    x = torch.from_numpy(np.random.default_rng(0).normal(2, 9, (11, D)))
    z, x_hat = dense(sae, x)
    latents = sae.encode(x)
    assert latents.values.shape[1] == max(1, int((z > 0).sum(1).max()))
    assert all(len(set(row)) == len(row) for row in latents.indices.tolist())
    filled = torch.zeros_like(z).scatter(1, latents.indices, latents.values.detach())
    torch.testing.assert_close(filled, z, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sae.decode(latents).detach(), x_hat, rtol=1e-9, atol=1e-9)


def test_lists_are_filled_up_with_latents_that_are_not_in_them() -> None:
    """Rows have no active latent, some, the last ones, and all."""
    pre = torch.full((4, 6), -1.0)
    pre[1, [0, 2, 3]] = torch.tensor([5.0, 6.0, 7.0])
    pre[2, 4:] = 8.0
    pre[3] = 9.0
    values, indices = listed([(part, part > 0) for part in (pre[:1], pre[1:])], 6)
    assert [sorted(row) for row in indices.tolist()] == [list(range(6))] * 4
    assert values.sum(1).tolist() == [0.0, 18.0, 16.0, 54.0]
    assert torch.equal(torch.zeros(4, 6).scatter(1, indices, values), pre.relu())


def test_no_rows_give_no_rows() -> None:
    """An empty batch is no special case for the caller."""
    assert make()(torch.zeros(0, D)).shape == (0, D)


def test_latents_of_many_rows_are_found_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rows × latents tensor is made of more rows than a block."""
    monkeypatch.setattr(above, "BLOCK_BYTES", 4 * 40 * 16)
    seen: list[int] = []
    inner = above.product

    def product(*arguments: torch.Tensor) -> torch.Tensor:
        seen.append(len(arguments[0]))
        return inner(*arguments)

    monkeypatch.setattr(above, "product", product)
    above.above(torch.randn(100, D), torch.randn(N, D), torch.zeros(D))
    assert seen == [16] * 6 + [4]


def test_the_directory_says_what_it_is(tmp_path: Path) -> None:
    """The architecture, and no k; the same SAE comes back."""
    sae = make().float()
    sae.save(tmp_path, {})
    again = load(tmp_path)
    assert again.config == sae.config
    assert '"architecture":"mlsae/relu"' in (tmp_path / "config.json").read_text().replace(" ", "")
    x = torch.randn(5, D)
    assert torch.equal(again(x), sae(x))


def test_k_is_no_setting_of_it() -> None:
    """A k of a ReLU SAE could only mislead; and a topk SAE has one."""
    shape = {"d_in": D, "num_latents": N, "normalize": "none"}
    for content, message in (
        (
            {"architecture": "relu", "k": 4},
            "config.json has unknown keys: k; expected a",
        ),
        ({}, "config.json lacks keys: k; expected architecture"),
        ({"architecture": "step"}, "architecture must be one of topk, relu, .*, got 'step'"),
    ):
        with pytest.raises(InputError, match=message):
            SAEConfig.from_dict(shape | content, "config.json")
