"""SAEs of every kind are analyzed, each row with its layer."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mlsae.analyze import Analysis, AnalyzeConfig, run
from mlsae.sae import load
from mlsae.train import TrainConfig
from mlsae.train import run as train


def _check_prefixes(found: Analysis, layer: dict[str, Any], trained: list[dict[str, Any]]) -> None:
    """FVU and L0 by prefix as training has them; entropies are means over latents."""
    rows = found.prefixes.to_pylist()
    mine = [row for row in rows if row["layer"] == layer["layer"]]
    assert mine[-1]["fvu"] == pytest.approx(layer["fvu"], rel=1e-6)
    assert [row["num_latents"] for row in mine] == ([16, 40, 64] if trained else [64])
    for row, one in zip(mine, trained, strict=False):
        assert row["num_latents"] == one["num_latents"]
        assert row["fvu"] == pytest.approx(one["fvu"], rel=1e-4)
        assert row["l0"] == pytest.approx(one["l0"], rel=1e-6)
    latents = found.latents.to_pylist()
    for row in rows[-len(mine) :]:
        own = [latent["layer_entropy"] for latent in latents[: row["num_latents"]]]
        living = [entropy for entropy in own if entropy is not None]
        assert row["layer_entropy"] == pytest.approx(sum(living) / len(living))
        assert row["dead_fraction"] == pytest.approx(1 - len(living) / len(own))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalize": "center"},
        {"normalize": "none", "layer_scale": "sqrt"},
        {"architecture": "relu", "l1": 0.01, "normalize": "scale"},
        {"architecture": "batchtopk", "threshold": "layer", "matryoshka": (16, 40)},
        {"architecture": "jumprelu", "target_l0": 6.0, "initial_threshold": 0.1},
        {"architecture": "gated", "l1": 0.01},
    ],
    ids=["center", "sqrt", "relu", "batchtopk", "jumprelu", "gated"],
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
        _check_prefixes(found, mine, theirs.get("prefixes", []))
