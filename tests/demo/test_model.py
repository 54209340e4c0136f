import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mlsae.base.files import sha256_file
from mlsae.demo import make_model, model_path

Packed = dict[str, npt.NDArray[Any]]


def test_weights_are_small_and_the_ones_recorded(training: dict[str, Any]) -> None:
    """The weights are at most 4 MB and have the recorded hash."""
    weights = model_path() / "model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    assert sha256_file(weights) == training["weights_sha256"]


def test_model_has_the_promised_shape() -> None:
    """A GPT-NeoX with rotary embedding, parallel residual, ≥ 6 layers and d_model ≥ 64."""
    config = json.loads((model_path() / "config.json").read_text())
    assert config["architectures"] == ["GPTNeoXForCausalLM"]
    assert config["use_parallel_residual"] is True
    assert config["rope_parameters"]["partial_rotary_factor"] > 0
    assert config["num_hidden_layers"] >= 6
    assert config["hidden_size"] >= 64


def unigram_nats(packed: Packed, tokens: npt.NDArray[Any]) -> float:
    """Add-one unigram of the training tokens, scored on all but each sequence's first token."""
    counts = dict.fromkeys(range(2048), 1)
    for token in tokens.tolist():
        counts[token] += 1
    total = sum(counts.values())
    targets = packed["held_out.jsonl"][:, 1:].ravel().tolist()
    return -sum(float(np.log(counts[token] / total)) for token in targets) / len(targets)


def test_recorded_cross_entropy_on_unseen_modules_is_an_independent_model_s(
    training: dict[str, Any], packed: Packed, numpy_model: Any
) -> None:
    """Held-out cross-entropy, recomputed in float64 numpy, is as recorded."""
    sequences = packed["held_out.jsonl"]
    nats = np.concatenate([numpy_model.nats(ids) for ids in np.array_split(sequences, 80)])
    recorded = training["cross_entropy_nats_per_token"]["held_out"]
    assert nats.mean() == pytest.approx(recorded, abs=1e-5)


def test_recorded_unigram_cross_entropy_is_the_counted_one(
    training: dict[str, Any], packed: Packed, lines: Any
) -> None:
    """The unigram figure, recounted token by token from the shipped text, is as recorded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    ids = [i for line in lines("train.jsonl") for i in [*tokenizer.encode(line["text"]).ids, 0]]
    recorded = training["cross_entropy_nats_per_token"]["unigram_held_out"]
    assert unigram_nats(packed, np.array(ids)) == pytest.approx(recorded, abs=1e-9)


def test_a_sample_of_training_text_agrees_with_the_recorded_cross_entropy(
    training: dict[str, Any], packed: Packed, numpy_model: Any
) -> None:
    """Every 16th training sequence scores the recorded figure within four standard errors."""
    sequences = packed["train.jsonl"][::16]
    nats = np.concatenate([numpy_model.nats(ids) for ids in np.array_split(sequences, 40)])
    error = nats.mean(1).std(ddof=1) / np.sqrt(len(nats))
    recorded = training["cross_entropy_nats_per_token"]["train"]
    assert abs(nats.mean() - recorded) < 4 * error
    assert error < 0.06


@pytest.mark.slow
def test_recorded_cross_entropy_on_training_text_is_an_independent_model_s(
    training: dict[str, Any], packed: Packed, numpy_model: Any
) -> None:
    """Training cross-entropy over the whole text, in float64 numpy, is as recorded."""
    parts = np.array_split(packed["train.jsonl"], 300)
    nats = np.concatenate([numpy_model.nats(ids) for ids in parts])
    recorded = training["cross_entropy_nats_per_token"]["train"]
    assert nats.mean() == pytest.approx(recorded, abs=1e-5)


def test_model_learnt_and_did_not_learn_by_heart(training: dict[str, Any]) -> None:
    """Held out: ≥ 1.5 nats below a unigram model, ≤ 0.3 above training text."""
    nats = training["cross_entropy_nats_per_token"]
    assert nats["unigram_held_out"] - nats["held_out"] >= 1.5
    assert nats["held_out"] - nats["train"] <= 0.3


def test_a_model_that_misses_a_figure_is_refused() -> None:
    """`check` names the figure, what was expected and what came."""
    with pytest.raises(make_model.UnfitModelError) as little:
        make_model.check({"train": 4.9, "held_out": 5.0, "unigram_held_out": 6.0})
    assert str(little.value) == (
        "the model learnt too little: held-out cross-entropy is 1.000 nats below the unigram "
        "model's, expected at least 1.5; nothing was written"
    )
    with pytest.raises(make_model.UnfitModelError) as heart:
        make_model.check({"train": 3.0, "held_out": 3.5, "unigram_held_out": 6.0})
    assert str(heart.value) == (
        "the model learnt its text by heart: held-out cross-entropy is 0.500 nats above training "
        "text's, expected at most 0.3; nothing was written"
    )


def test_transformers_loads_the_model_offline_and_it_predicts_the_same(
    monkeypatch: pytest.MonkeyPatch, packed: Packed, numpy_model: Any, demo_model: Path
) -> None:
    """AutoModelForCausalLM and the numpy model give equal likelihoods, token by token."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    ids = packed["held_out.jsonl"][:2]
    ids_BT = torch.from_numpy(ids)
    with torch.no_grad():
        logits = model(input_ids=ids_BT).logits[:, :-1].double()
    nats = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids_BT[:, 1:], reduction="none"
    )
    np.testing.assert_allclose(nats.numpy(), numpy_model.nats(ids), atol=2e-4)
