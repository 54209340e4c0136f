"""The tools themselves read what is exported, and what they write is imported."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.sae import SAE, ReLU, SAEConfig, TopK, load
from mlsae.sae.formats.convert import export_sae, import_sae

pytestmark = [
    pytest.mark.external,
    pytest.mark.timeout(3000),  # Environments may have to be installed.
]

D, N, K = 24, 96, 6
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
ROUNDED = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def x(tmp_path: Path) -> Path:
    """A file of rows of different spread and mean, float64."""
    generator = np.random.default_rng(1)
    values = generator.normal(size=(200, D)) * generator.uniform(1, 30, (200, 1)) + 3
    np.save(tmp_path / "x.npy", values)
    return tmp_path / "x.npy"


def ours(sae: SAE, x: Path) -> npt.NDArray[np.float64]:
    """x̂ in float64."""
    return np.asarray(sae.double()(torch.from_numpy(np.load(x))).detach().numpy())


def random_sae(path: Path, normalize: str, *, bias: bool, architecture: str = "topk") -> Path:
    """An SAE of two layers with every weight random."""
    config = SAEConfig(
        d_in=D,
        num_latents=N,
        architecture=TopK(K) if architecture == "topk" else ReLU(),
        normalize=normalize,
        encoder_bias=bias,
    )
    sae = SAE(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
    sae.save(path, {"site": "resid_post", "layers": [1, 4]})
    return path


@pytest.mark.parametrize(
    ("tool", "normalize", "bias"),
    [
        ("saelens", "standardize", False),
        ("saelens", "none", True),
        ("sparsify", "none", False),
        ("sparsify", "none", True),
        ("dictionary_learning", "none", False),
        ("dictionary_learning", "none", True),
    ],
)
def test_the_tool_reads_an_export(
    tool: str, normalize: str, bias: bool, peer: Callable[..., str], x: Path, tmp_path: Path
) -> None:
    """By its own loader, with equal reconstructions."""
    run = random_sae(tmp_path / "run", normalize, bias=bias)
    written = export_sae(run, tool.replace("_", "-"), tmp_path / "out", model="gpt2")
    assert len(written) == 2
    for directory in written:
        peer(tool, "forward", directory, x, tmp_path / "y.npy")
        expected = ours(load(run), x)
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, **CLOSE)


@pytest.mark.parametrize(
    ("tool", "normalize", "close"),
    [
        ("saelens", "standardize", CLOSE),
        ("saelens", "none", CLOSE),
        # The loader of dictionary_learning makes decoder rows unit, in float32.
        ("dictionary_learning", "none", ROUNDED),
    ],
)
def test_the_tool_reads_an_export_of_relu(
    tool: str,
    normalize: str,
    close: dict[str, float],
    peer: Callable[..., str],
    x: Path,
    tmp_path: Path,
) -> None:
    """Both tools have this architecture under other names."""
    run = random_sae(tmp_path / "run", normalize, bias=True, architecture="relu")
    for directory in export_sae(run, tool.replace("_", "-"), tmp_path / "out", model="gpt2"):
        peer(tool, "forward", directory, x, tmp_path / "y.npy")
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), ours(load(run), x), **close)


def test_saelens_cannot_decode_a_standardised_sae_twice(
    peer: Callable[..., str], x: Path, tmp_path: Path
) -> None:
    """The limit that docs/interop.md names; without a normalisation it can."""
    for normalize, said in (("standardize", "AttributeError\n"), ("none", "")):
        run = random_sae(tmp_path / normalize, normalize, bias=False)
        directory, _ = export_sae(run, "saelens", tmp_path / f"{normalize}-out")
        assert peer("saelens", "twice", directory, x) == said


@pytest.mark.parametrize(
    ("kind", "close"),
    [
        ("none", CLOSE),
        ("layer_norm", CLOSE),
        # Norms of the decoder are folded here into float32: those of a checkpoint, and what is left
        # of them after SAELens has done the same.
        ("trained", ROUNDED),
        ("checkpoint", ROUNDED),
    ],
)
def test_an_sae_of_saelens_is_imported(
    kind: str, close: dict[str, float], peer: Callable[..., str], x: Path, tmp_path: Path
) -> None:
    """For inference, normalised, from training, and a checkpoint of training."""
    peer("saelens", "make", kind, tmp_path / "theirs", x, tmp_path / "y.npy")
    sae = import_sae(tmp_path / "theirs", tmp_path / "sae")
    np.testing.assert_allclose(ours(sae, x), np.load(tmp_path / "y.npy"), **close)
    assert (sae.training_record["site"], sae.training_record["layers"]) == ("mlp_out", [2])


@pytest.mark.parametrize(
    ("tool", "folder"), [("sparsify", "layers.3"), ("dictionary_learning", "trainer_0")]
)
def test_an_sae_of_another_tool_is_imported(
    tool: str, folder: str, peer: Callable[..., str], x: Path, tmp_path: Path
) -> None:
    """Random weights of sparsify; dictionary_learning trains its SAE with its own trainer."""
    peer(tool, "make", tmp_path / folder, x, tmp_path / "y.npy")
    sae = import_sae(tmp_path / folder, tmp_path / "sae")
    np.testing.assert_allclose(ours(sae, x), np.load(tmp_path / "y.npy"), **CLOSE)
    assert (sae.training_record["site"], sae.training_record["layers"]) == ("resid_post", [3])


@pytest.mark.skipif(
    "MLSAE_PUBLISHED" not in os.environ,
    reason="set MLSAE_PUBLISHED to a checkout of github.com/tim-lawson/mlsae",
)
@pytest.mark.parametrize("normalize", ["standardize", "none"])
def test_the_published_module_both_ways(
    normalize: str, peer: Callable[..., str], x: Path, tmp_path: Path
) -> None:
    """The module is no package of the index: a checkout of its source has to be given."""
    source = os.environ["MLSAE_PUBLISHED"]
    run = random_sae(tmp_path / "run", normalize, bias=False)
    (directory,) = export_sae(run, "mlsae", tmp_path / "out")
    peer("published", "forward", directory, x, tmp_path / "y.npy", source)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), ours(load(run), x), **CLOSE)
    peer("published", "make", tmp_path / "theirs", x, tmp_path / "y.npy", source)
    sae = import_sae(tmp_path / "theirs", tmp_path / "sae")
    np.testing.assert_allclose(ours(sae, x), np.load(tmp_path / "y.npy"), **CLOSE)
