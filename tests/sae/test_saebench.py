"""The object for SAEBench and SAELens; tests/external runs it in the tools themselves."""

from typing import Any

import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.sae.formats.saebench import SAEBenchModule

D, N, LAYER = 12, 40, 5
STATE: dict[str, dict[str, Any]] = {
    "standardize": {},
    "none": {"normalize": "none"},
    "scale": {"normalize": "scale", "layers": (2, LAYER)},
    "center": {"normalize": "center", "layers": (2, LAYER)},
    "layer_scale": {"normalize": "none", "layer_scale": "log", "layers": (2, LAYER)},
}


def make(state: str = "standardize") -> SAE:
    """An SAE in float64 with every weight and all state of layers drawn."""
    torch.manual_seed(1)
    sae = SAE(SAEConfig(d_in=D, num_latents=N, architecture=TopK(5), **STATE[state])).double()
    with torch.no_grad():
        for tensor in (*sae.parameters(), sae.layer_shift):
            if tensor is not None:
                tensor.normal_()
        if sae.layer_factor is not None:
            sae.layer_factor.copy_(torch.tensor([0.3, 4.0]))
    sae.training_record = {"site": "mlp_out", "layers": [2, LAYER]}
    return sae


def wrap(sae: SAE, purpose: Any = "latents", **changes: Any) -> SAEBenchModule:
    return SAEBenchModule(sae, layer=LAYER, model_name="gpt2", purpose=purpose, **changes)


x = torch.randn(6, 7, D, generator=torch.Generator().manual_seed(2)).double() * 3 + 1


@pytest.mark.parametrize("state", STATE)
@pytest.mark.parametrize("purpose", ["latents", "reconstruction"])
def test_ablating_a_latent_takes_what_it_wrote(state: str, purpose: str) -> None:
    """Two decodings of one code differ by s z_j W_dec,j, whatever the purpose."""
    sae = make(state)
    tool, latents = wrap(sae, purpose), sae.encode(x, LAYER)
    f = tool.encode(x)
    whole = tool.decode(f)
    j = int(f[..., :N].sum((0, 1)).argmax())
    f[..., j] = 0
    values = torch.where(latents.indices == j, 0, latents.values)
    expected = sae.decode(latents) - sae.decode(latents._replace(values=values))
    assert expected.abs().sum() > 0
    torch.testing.assert_close(whole - tool.decode(f), expected)


@pytest.mark.parametrize("state", STATE)
def test_a_reconstruction_is_the_saes(state: str) -> None:
    """The one purpose of standardised rows, and either of others."""
    sae = make(state)
    for purpose in ("reconstruction",) if state == "standardize" else ("latents", "reconstruction"):
        tool = wrap(sae, purpose)
        torch.testing.assert_close(tool(x), sae(x, LAYER))
        torch.testing.assert_close(tool.encode(x) @ tool.W_dec + tool.b_dec, sae(x, LAYER))


def test_shapes_and_facts_are_as_the_tools_read_them() -> None:
    """Latents alone, or with the two pseudo-latents of a reconstruction."""
    for purpose, width in (("latents", N), ("reconstruction", N + 2)):
        tool = wrap(make(), purpose)
        assert (tool.W_enc.shape, tool.W_dec.shape) == ((D, width), (width, D))
        assert (tool.b_enc.shape, tool.b_dec.shape) == ((width,), (D,))
        assert tool.encode(x).shape == (6, 7, width)
        assert (tool.W_enc.norm(dim=0) > 0).all()
        cfg = tool.cfg
        assert (cfg.hook_name, cfg.hook_layer) == ("blocks.5.hook_mlp_out", 5)
        assert (cfg.d_in, cfg.d_sae, cfg.model_name, cfg.dtype) == (D, width, "gpt2", "float64")
        assert cfg.metadata.hook_name == cfg.hook_name
        assert cfg.to_dict()["architecture"] == "topk"


def test_the_sae_stays_as_it_is() -> None:
    """Tools convert what they are given to 16 bits."""
    sae = make()
    tool = wrap(sae).to(torch.bfloat16)
    assert (tool.dtype, sae.b.dtype) == (torch.bfloat16, torch.float64)
    assert tool.encode(x).dtype == torch.bfloat16


def test_latents_pass_a_hook_point() -> None:
    """A module of the tool's own sees them, under SAELens's name."""

    class Doubled(torch.nn.Module):
        def forward(self, f: torch.Tensor) -> torch.Tensor:
            return 2 * f

    plain, hooked = wrap(make()), wrap(make(), hook_point=Doubled)
    assert list(hooked.hook_dict) == ["hook_sae_acts_post"]
    torch.testing.assert_close(hooked(x), 2 * plain(x))


def test_what_it_refuses() -> None:
    """A purpose, a site and a layer that there are not."""
    sae = make()
    for call, message in (
        (lambda: wrap(sae, "both"), "purpose must be one of latents, reconstruction, got 'both'"),
        (lambda: wrap(sae, site="hook_z"), "site must be one of resid_pre.*, got 'hook_z'"),
        (
            lambda: SAEBenchModule(sae, layer=3, model_name="gpt2", purpose="latents"),
            "this SAE has layers 2, 5, got 3",
        ),
    ):
        with pytest.raises(InputError, match=message):
            call()
