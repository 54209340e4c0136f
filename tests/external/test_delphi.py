"""Delphi's own loader reads the cache that is written for it, and gives what the analysis holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from safetensors.numpy import load_file

import mlsae.demo
from mlsae.analyze import Analysis, AnalyzeConfig, run
from mlsae.harvest import HarvestConfig
from mlsae.harvest import run as run_harvest
from mlsae.sae import SAE, SAEConfig, TopK
from mlsae.store import Store, open_store

pytestmark = [
    pytest.mark.external,
    pytest.mark.timeout(3000),  # Environments may have to be installed.
]

LENGTH, EXAMPLE, NUM_LATENTS = 64, 16, 48


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Analysis, Path]:
    """A store of the transformer that comes with the package, an analysis, the cache."""
    root = tmp_path_factory.mktemp("delphi")
    run_harvest(
        HarvestConfig(
            model=str(mlsae.demo.model_path()),
            dataset=str(mlsae.demo.text_path("held_out")),
            out=root / "acts",
            max_tokens=40 * LENGTH,
            context_length=LENGTH,
            layers=(0, 2),
            device="cpu",
        )
    )
    store = open_store(root / "acts")
    sae = SAE(
        SAEConfig(d_in=store.d_model, num_latents=NUM_LATENTS, architecture=TopK(4)), _generator()
    )
    # One without events, at the end of the first file.
    with torch.no_grad():
        sae.W_enc[8] = 0
    record = {
        "store_id": store.store_id,
        "model_fingerprint": store.source["model"]["fingerprint"],
        "site": "resid_post",
        "layers": [0, 2],
        "skip_positions": 1,
        "validation": {"fraction": 0.1, "seed": 0, "tokens_sha256": store.plan.tokens_sha256},
    }
    sae.save(root / "sae", record)
    config = AnalyzeConfig(
        cache=root / "acts",
        sae=root / "sae",
        out=root / "analysis",
        rows="train",
        events_max_tokens=30 * LENGTH,
        to_delphi=root / "latents",
        device="cpu",
    )
    return store, run(config), root / "latents"


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _dense(analysis: Analysis, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Values (sequences, positions, latents) of the events, and the sequences' indices."""
    table = analysis.events.to_table()
    sequences = np.unique(table["token"].to_numpy() // LENGTH)
    table = table.filter(pc.field("layer") == layer)
    tokens, latents = table["token"].to_numpy(), table["latent"].to_numpy()
    dense = np.zeros((len(sequences), LENGTH, NUM_LATENTS), dtype=np.float16)
    rows = np.searchsorted(sequences, tokens // LENGTH)
    dense[rows, tokens % LENGTH, latents] = table["value"].to_numpy()
    return dense, sequences


def test_its_loader_gives_the_events_and_tokens(
    made: tuple[Store, Analysis, Path], peer: Callable[..., str], tmp_path: Path
) -> None:
    """All latents are read, and chosen ones."""
    store, analysis, cache = made
    peer("delphi", "read", cache, tmp_path / "found.safetensors")
    found = load_file(tmp_path / "found.safetensors")
    for layer in (0, 2):
        dense, sequences = _dense(analysis, layer)
        assert len(sequences) == 30
        for name, latents in (("all", range(NUM_LATENTS)), ("some", (1, 7, 40))):
            tokens = store.tokens().reshape(-1, LENGTH)[sequences]
            np.testing.assert_array_equal(found[f"{name}/tokens"], tokens)
            # By latent, then row, then position.
            wanted = np.argwhere(dense.transpose(2, 0, 1) > 0)
            wanted = wanted[np.isin(wanted[:, 0], latents)][:, [1, 2, 0]]
            locations = found[f"{name}/layers.{layer}/locations"]
            np.testing.assert_array_equal(locations, wanted)
            assert len(wanted) > 300
            activations = found[f"{name}/layers.{layer}/activations"]
            np.testing.assert_array_equal(activations, dense[tuple(wanted.T)])


def test_what_it_would_explain_are_the_windows_of_the_events(
    made: tuple[Store, Analysis, Path], peer: Callable[..., str], tmp_path: Path
) -> None:
    """With the tokenizer that the cache names; and its windows of inactive tokens are without."""
    store, analysis, cache = made
    peer("delphi", "records", cache, tmp_path / "found.json", EXAMPLE)
    found: dict[str, Any] = {
        row["latent"]: row for row in json.loads((tmp_path / "found.json").read_text())
    }
    num_checked = 0
    for layer in (0, 2):
        dense, sequences = _dense(analysis, layer)
        tokens = store.tokens().reshape(-1, LENGTH)[sequences].reshape(-1, EXAMPLE)
        for latent in range(NUM_LATENTS):
            values = dense[:, :, latent].reshape(-1, EXAMPLE)
            active = np.flatnonzero(values.max(axis=1))
            row = found.get(f"layers.{layer}_latent{latent}")
            if len(active) == 0:
                assert row is None
                continue
            assert row is not None
            expected = sorted(zip(tokens[active].tolist(), values[active].tolist(), strict=True))
            assert sorted(zip(row["tokens"], row["values"], strict=True)) == expected
            assert row["frequency"] == pytest.approx((dense[:, :, latent] > 0).mean())
            assert all(row["text"])
            inactive = np.delete(tokens, active, axis=0).tolist()
            assert all(window in inactive for window in row["inactive"])
            num_checked += 1
    assert num_checked > 60
