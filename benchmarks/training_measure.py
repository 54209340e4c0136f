"""Measurements of the studies of `benchmarks.training` beyond the summary of `mlsae train`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mlsae.sae
from mlsae.store import Store, open_store
from mlsae.store.read.split import validation_of
from mlsae.train.running.evaluate import POSITION_0_OUT, evaluate

HELD_OUT_SHARE = 0.05
TRAINED_SHARE = 0.94
"""The rest lies between the trained sequences and the held-out ones, so no document is in both."""
SKIP_POSITIONS = 1
MEASURES = ("l0", "penalty", "l1", "mse", "fvu")
"""Columns of a ReLU SAE, by layer."""


@dataclass(frozen=True)
class Part:
    """Trained on a part of the store."""

    epochs: int
    """Passes over it; it is 1/epochs of what is trained on."""
    store: Path
    runs: Path
    """Directory of its SAEs."""


def split_sequences(store: Store, num_parts: int) -> tuple[int, tuple[int, int]]:
    """Sequences of the smallest part, and the first held-out sequence and the one after the last.

    Args:
        store: whole.
        num_parts: the largest part has so many times the sequences of the smallest.
    """
    num_held_out = max(1, round(store.num_sequences * HELD_OUT_SHARE))
    per_part = int(store.num_sequences * TRAINED_SHARE) // num_parts
    return per_part, (store.num_sequences - num_held_out, store.num_sequences)


def check_held_out(
    store: Store, held_out: Path, sequences: tuple[int, int], parts: Sequence[Part]
) -> dict[str, Any]:
    """Hold the parts against the whole: what is held out is nowhere trained on.

    Args:
        store: whole.
        held_out: the store of the held-out sequences.
        sequences: the first of them in the whole, and the one after the last.
        parts: trained on.

    Returns:
        Counts, as JSON.

    Raises:
        AssertionError: something held out was trained on.
    """
    length = store.context_length
    tokens, documents = store.tokens(), store.documents()
    apart = slice(sequences[0] * length, sequences[1] * length)
    unseen = open_store(held_out)
    assert np.array_equal(unseen.tokens(), tokens[apart]), "held-out tokens are not the store's"
    wholly_new = {row.tobytes() for row in tokens[apart].reshape(-1, length)}
    for part in parts:
        trained = open_store(part.store)
        assert np.array_equal(trained.tokens(), tokens[: trained.num_tokens]), part.store
        assert not wholly_new & {row.tobytes() for row in trained.tokens().reshape(-1, length)}
        shared = np.intersect1d(documents[: trained.num_tokens], documents[apart])
        assert not len(shared), f"{part.store}: documents {shared} are in both"
        for record in part.runs.glob("*/training.json"):
            content = json.loads(record.read_text())
            assert content["store_id"] == trained.store_id, f"{record} is of another store"
            assert content["store_id"] != unseen.store_id
    return {
        "num_held_out": sequences[1] - sequences[0],
        "num_between": sequences[0] - max(open_store(p.store).num_sequences for p in parts),
        "held_out_documents": len(np.unique(documents[apart])),
    }


def evaluated(part: Part, held_out: Path) -> list[dict[str, Any]]:
    """The SAEs of a part, each with its FVU over held-out sequences and over as many trained ones.

    The trained ones are the first of the store, which every part has.
    """
    trained, unseen = open_store(part.store), open_store(held_out)
    found = []
    for entry in json.loads((part.runs / "summary.json").read_text())["saes"]:
        sae = mlsae.sae.load(part.runs / entry["name"])
        record = sae.training_record
        measured = {
            name: _fvu(sae, store, min(unseen.num_sequences, trained.num_sequences))
            for name, store in (("fvu_by_layer", unseen), ("trained_fvu_by_layer", trained))
        }
        found.append(
            {
                "name": entry["name"],
                "epochs": part.epochs,
                "unique_tokens": trained.num_tokens,
                "num_steps": record["settings"]["num_steps"],
                "num_rows": record["settings"]["num_rows"],
                "num_latents": entry["num_latents"],
                "seed": entry["seed"],
                **measured,
            }
        )
    return found


def _fvu(sae: mlsae.sae.SAE, store: Store, num_sequences: int) -> list[float]:
    measured = evaluate(
        sae,
        store,
        store.sites[0],
        store.layers,
        np.arange(num_sequences),
        skip_positions=SKIP_POSITIONS,
        rank=0,
        world_size=1,
        sum_over_ranks=torch.Tensor.clone,
    )
    return [layer["fvu"] for layer in measured[POSITION_0_OUT]["layers"]]


def penalised(store: Store, site: str, runs: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """ReLU SAEs with L0, L1, MSE and FVU by layer over their validation rows.

    `penalty` is the mean over rows of Σ_j z_j ‖W_dec,j‖, as the loss has it; `l1` the same divided
    by the layer's scale, so in units of x; `mse` the mean of ‖x − x̂‖². One that diverged has its
    name and `diverged`.
    """
    found = []
    rows: dict[int, torch.Tensor] = {}
    for name in names:
        if (runs / name / "diverged.json").exists():
            found.append({"name": name, "diverged": True})
            continue
        sae = mlsae.sae.load(runs / name)
        settings = sae.training_record["settings"]
        if not rows:
            held_out = sae.training_record["validation"]
            sequences = validation_of(store, held_out["fraction"], held_out["seed"])
            rows = {layer: _rows(store, site, layer, sequences) for layer in store.layers}
        layers = [_penalised(sae, x, layer) for layer, x in rows.items()]
        found.append(
            {
                "name": name,
                "layer_scale": settings.get("layer_scale", "none"),
                "lr": settings["lr"],
                "l1_weight": settings["l1"],
                "dead_fraction": sae.training_record["metrics"][POSITION_0_OUT]["dead_fraction"],
                **{key: [layer[key] for layer in layers] for key in MEASURES},
            }
        )
    return found


def _rows(store: Store, site: str, layer: int, sequences: Any) -> torch.Tensor:
    """Eligible rows of sequences, (rows, d_model) float32."""
    per, kept = store.rows_per_sequence, []
    for start in (sequences * per).tolist():
        x = store.read(site, layer, start, start + per)
        kept.append(x[store.eligible(SKIP_POSITIONS, start, start + per)])
    return torch.from_numpy(np.concatenate(kept))


@torch.no_grad()
def _penalised(sae: mlsae.sae.SAE, x: torch.Tensor, layer: int) -> dict[str, float]:
    lengths = torch.linalg.vector_norm(sae.W_dec, dim=1)
    error = active = penalty = in_units_of_x = 0.0
    for piece in torch.split(x, 4096):
        latents = sae.encode(piece, layer)
        values = latents.values.double()
        active += float((values > 0).sum())
        weighted = values * lengths[latents.indices]
        penalty += float(weighted.sum())
        in_units_of_x += float((weighted * latents.scale).sum())
        error += float((piece - sae.decode(latents)).double().square().sum())
    x = x.double()
    return {
        "l0": active / len(x),
        "penalty": penalty / len(x),
        "l1": in_units_of_x / len(x),
        "mse": error / len(x),
        "fvu": error / float((x - x.mean(dim=0)).square().sum()),
    }
