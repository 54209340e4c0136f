"""SAEs of every kind are analyzed, each row with its layer."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mlsae.analyze import AnalyzeConfig, run
from mlsae.sae import load
from mlsae.train import TrainConfig
from mlsae.train import run as train


@pytest.mark.parametrize(
    "changes",
    [
        {"normalize": "center"},
        {"normalize": "none", "layer_scale": "sqrt"},
        {"architecture": "relu", "l1": 0.01, "normalize": "scale"},
    ],
    ids=["center", "sqrt", "relu"],
)
def test_an_analysis_says_of_the_held_out_rows_what_training_did(
    changes: dict[str, Any], sample: Any, tmp_path: Path
) -> None:
    """FVU and L0 by layer; every active latent of every row is an event."""
    common: dict[str, Any] = {"num_latents": 64, "batch_size": 60, "validation_fraction": 0.1}
    config = TrainConfig(
        cache=sample.path, out=tmp_path / "sae", **{"k": 4} | common | changes, device="cpu"
    )
    trained = load(train(config).directory).training_record["metrics"]["position_0_out"]
    out = tmp_path / "out"
    found = run(
        AnalyzeConfig(figures=False, cache=sample.path, sae=tmp_path / "sae", out=out, device="cpu")
    )
    for mine, theirs in zip(found.layers.to_pylist(), trained["layers"], strict=True):
        assert mine["layer"] == theirs["layer"]
        assert mine["fvu"] == pytest.approx(theirs["fvu"], rel=1e-4)
        assert mine["l0"] == pytest.approx(theirs["l0"], rel=1e-6)
        events = pq.read_table(out / "events" / f"layer-{mine['layer']}")
        assert events.num_rows == round(mine["l0"] * theirs["num_rows"])
