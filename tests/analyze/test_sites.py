"""Every site is spliced where it lies."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mlsae.analyze.measure.model.cross_entropy import measure
from mlsae.analyze.pairing import pair
from mlsae.analyze.transformer import find_places, find_transformer
from mlsae.base.words import SITES
from mlsae.models import load
from mlsae.models.capture import capture
from mlsae.models.inputs import Inputs
from mlsae.store import create

LENGTH, LAYERS = 16, (0, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sites of a random GPT-2, in float32, with its model beside it."""
    root = tmp_path_factory.mktemp("sites")
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=3,
        n_head=2,
        n_positions=LENGTH,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(root / "model")
    transformer = load(root / "model")
    tokens = np.random.default_rng(0).integers(1, 50, 10 * LENGTH)
    with create(
        root / "acts",
        tokens=tokens,
        context_length=LENGTH,
        layers=LAYERS,
        sites=SITES,
        d_model=16,
        encoding="float32",
        source={"model": transformer.describe()},
        provenance={"model": transformer.place()},
    ) as writer:
        inputs = Inputs(tokens=torch.from_numpy(tokens).reshape(-1, LENGTH))
        captured = capture(transformer, inputs, LAYERS, SITES)
        writer.append({key: x.reshape(-1, 16).numpy() for key, x in captured.items()})
    return root / "acts"


@pytest.mark.parametrize("site", SITES)
def test_what_is_stored_or_exact_costs_nothing_at_its_site(
    site: str, store: Path, sae_maker: Callable[..., Path]
) -> None:
    """Stored activations of another site, or put elsewhere, would."""
    pairing = pair(store, sae_maker(store, site=site), torch.device("cpu"))
    transformer, _ = find_transformer(
        pairing.store, site, find_places(pairing.store, None), pairing.device
    )
    assert transformer is not None
    found, exact = (
        measure(
            transformer,
            replace(pairing, sae=sae),
            np.arange(10),
            batch_rows=3 * LENGTH,
            progress=lambda _n: None,
        )
        for sae in (pairing.sae, lambda x, _layer: x)
    )
    assert found is not None
    assert exact is not None
    np.testing.assert_allclose(found.ce_store, found.ce, atol=1e-5)
    assert (found.kl > 1e-4).all()
    assert exact.delta_ce.tolist() == exact.kl.tolist() == [0.0, 0.0]
