"""Trained models on real text: what is stored is what the model computes its predictions from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mlsae.harvest import HarvestConfig, run
from mlsae.models import load
from mlsae.store import SPECIAL, open_store


def cross_entropies(path: Path) -> tuple[float, float]:
    """Nats a token, targets inside one document: from the stored last layer, from the live model.

    The first puts the final norm and the head on what the store holds.
    """
    store = open_store(path)
    model = load(store.provenance()[-1]["model"]["name"])
    last = store.layers[-1]
    x = torch.from_numpy(store.read("resid_post", last, 0, store.num_rows))
    norms = ("final_layer_norm", "norm")
    norm = next(getattr(model.backbone, n) for n in norms if hasattr(model.backbone, n))
    tokens = torch.from_numpy(store.tokens().astype(np.int64))
    with torch.no_grad():
        stored = model.model.get_output_embeddings()(norm(x))
        live = model.model(input_ids=tokens.reshape(-1, store.context_length)).logits
    documents, positions = store.documents(), store.positions()
    inside = torch.from_numpy((documents[1:] == documents[:-1]) & (positions[1:] > 0))
    from_store, from_model = (
        float(torch.nn.functional.cross_entropy(logits[:-1][inside].double(), tokens[1:][inside]))
        for logits in (stored, live.flatten(0, 1))
    )
    return from_store, from_model


def test_stories_model_predicts_stories_from_its_stored_activations(
    shared: Path, tmp_path: Path
) -> None:
    """A BOS opens every sequence; unigrams would need 4.83 nats a token, this model about 2."""
    run(
        HarvestConfig(
            model=str(shared / "models" / "stories260k"),
            dataset=str(shared / "text" / "tinystories_1000.jsonl"),
            out=tmp_path / "acts",
            context_length=256,
            layers=(0, 4),
            max_tokens=12_800,
            device="cpu",
        )
    )
    store = open_store(tmp_path / "acts")
    flags = store.token_flags().reshape(-1, 256)
    assert (store.tokens().reshape(-1, 256)[:, 0] == 1).all()
    assert (flags[:, 0] == SPECIAL).all()
    from_store, from_model = cross_entropies(tmp_path / "acts")
    assert from_store == pytest.approx(from_model, abs=1e-3)
    assert from_store < 2.2


def test_character_model_without_any_separator(shared: Path, tmp_path: Path) -> None:
    """The tokenizer has neither EOS nor BOS: stories follow one another, every token a row."""
    run(
        HarvestConfig(
            model=str(shared / "models" / "tinystories-char-gpt2"),
            dataset=str(shared / "text" / "tinystories_1000.jsonl"),
            out=tmp_path / "acts",
            max_tokens=3_000,
            device="cpu",
        )
    )
    store = open_store(tmp_path / "acts")
    assert (store.context_length, store.num_tokens) == (32, 2976)
    assert store.source["packing"]["document_eos"] is None
    assert store.documents().max() > 1


def test_demo_model_predicts_its_text_from_its_stored_activations(
    demo_model: Path, tmp_path: Path
) -> None:
    from mlsae.demo import text_path

    if not (demo_model / "config.json").is_file():
        pytest.skip("the demo model is not made yet: make demo-model")
    run(
        HarvestConfig(
            model=str(demo_model),
            dataset=str(text_path("held_out")),
            out=tmp_path / "acts",
            max_tokens=6_400,
            device="cpu",
        )
    )
    assert len(open_store(tmp_path / "acts").layers) >= 6
    from_store, from_model = cross_entropies(tmp_path / "acts")
    assert from_store == pytest.approx(from_model, abs=1e-3)
