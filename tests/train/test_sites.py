"""A store of several sites: one is trained on, and it is the one that was asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mlsae.base.errors import InputError
from mlsae.base.words import SITES
from mlsae.sae import load
from mlsae.store import create
from mlsae.train import TrainConfig, run

Values = dict[str, list[np.ndarray]]
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def values() -> Values:
    """Site → an array for each layer: different ones, of the same text."""
    generator = np.random.default_rng(0)
    return {
        site: [generator.normal(size=(160, 12)).astype(np.float32) + i for _ in LAYERS]
        for i, site in enumerate(SITES)
    }


@pytest.fixture(scope="module")
def store(values: Values, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("all") / "acts", values)


def write(path: Path, values: Values) -> Path:
    with create(
        path,
        tokens=np.arange(160),
        context_length=16,
        layers=LAYERS,
        d_model=12,
        sites=list(values),
    ) as writer:
        writer.append(
            {(s, n): x for s, of in values.items() for n, x in zip(LAYERS, of, strict=True)}
        )
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(cache: Path, out: str, **more: Any) -> TrainConfig:
        fixed: dict[str, Any] = {"num_latents": 24, "k": 3, "batch_size": 40, "device": "cpu"}
        return TrainConfig(cache=cache, out=tmp_path / out, validation_fraction=0.1, **fixed | more)

    return make


@pytest.mark.parametrize("site", SITES)
def test_the_rows_are_those_of_the_site(
    site: str,
    values: Values,
    store: Path,
    settings: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    """Bit for bit the SAE of a store that holds nothing else, and on record."""
    found = run(settings(store, "found", site=site)).directory
    alone = write(tmp_path / "alone", {site: values[site]})
    expected = run(settings(alone, "expected")).directory
    weights = load_file(expected / "sae.safetensors")
    for name, tensor in load_file(found / "sae.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    assert load(found).training_record["site"] == site
    assert load(found).training_record["metrics"] == load(expected).training_record["metrics"]


def test_a_store_of_several_needs_the_flag(
    store: Path, settings: Callable[..., TrainConfig]
) -> None:
    message = (
        "acts holds the sites resid_pre, resid_mid, resid_post, attn_out, mlp_out, and an SAE is "
        "trained on one: choose it with --site"
    )
    with pytest.raises(InputError, match=message):
        run(settings(store, "out"))
