"""Cross-entropy of the transformer as a store records it: initialisation, documents, padding, kind.

A float32 store holds just what the transformer gives when it is run again. So stored activations
spliced in cost nothing, unless the model or what it was given is not the harvest's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mlsae.analyze import AnalyzeConfig, run
from mlsae.analyze.measure.model.cross_entropy import CrossEntropy, measure
from mlsae.analyze.measure.model.sequences import read_sequences
from mlsae.analyze.pairing import pair
from mlsae.analyze.selection import choose_sequences
from mlsae.analyze.transformer import find_places, find_transformer
from mlsae.base.errors import InputError
from mlsae.models import load
from mlsae.models.capture import capture
from mlsae.models.inputs import Inputs
from mlsae.models.weights.initialization import INITS
from mlsae.store import PADDING, create, open_store

LENGTH = 24
CE_COLUMNS = ("num_ce_tokens", "ce", "ce_store", "ce_sae", "delta_ce", "kl")


def scored(path: Path, sae: Path, rows: str) -> CrossEntropy:
    """The cross-entropy of a store's transformer, found and fed from what the store says alone."""
    pairing = pair(path, sae, torch.device("cpu"))
    transformer, reason = find_transformer(
        pairing.store, pairing.site, find_places(pairing.store, None), pairing.device
    )
    assert transformer is not None, reason
    sequences = choose_sequences(pairing.store, rows, pairing.validation, None)
    found = measure(
        transformer, pairing, sequences, batch_rows=3 * LENGTH, progress=lambda _n: None
    )
    assert found is not None
    np.testing.assert_allclose(found.ce_store, found.ce, atol=1e-5)
    assert (abs(found.delta_ce) > 1e-3).all()
    assert (found.kl > 1e-3).all()
    return found


@pytest.fixture(scope="module")
def trained_ce(harvested: Callable[..., Path], sae_maker: Callable[..., Path]) -> float:
    store = harvested()
    return scored(store, sae_maker(store), "validation").ce


@pytest.mark.parametrize("init", [init for init in INITS if init != "trained"])
def test_every_initialisation_is_rebuilt_from_the_plan(
    init: str,
    trained_ce: float,
    harvested: Callable[..., Path],
    sae_maker: Callable[..., Path],
) -> None:
    """The control's noise is a vector a token of the text, so batches must know where they lie."""
    store = harvested(init=init, init_seed=3)
    # Validation sequences do not follow one another.
    found = scored(store, sae_maker(store), "validation")
    assert found.ce != pytest.approx(trained_ce, abs=1e-3)


@pytest.mark.parametrize(
    ("packing", "isolate"), [("concatenate", True), ("document", False), ("document", True)]
)
def test_documents_are_kept_apart_and_padding_is_unseen_as_in_the_harvest(
    packing: str,
    isolate: bool,
    demo_model: Path,
    harvested: Callable[..., Path],
    sae_maker: Callable[..., Path],
) -> None:
    """And the untouched cross-entropy is that of each document run alone by transformers."""
    path = harvested(packing=packing, isolate_documents=isolate)
    found = scored(path, sae_maker(path), "all")
    store = open_store(path)
    assert bool((store.token_flags() & PADDING).any()) == (packing == "document")
    (whole,) = read_sequences(store, np.arange(20), 1, 20, torch.device("cpu"))
    assert (whole.inputs.documents is not None) == isolate
    if packing == "document":
        # Causal attention hides the padding behind a text anyway.
        padded = torch.from_numpy(store.token_flags() & PADDING != 0).reshape(20, LENGTH)
        assert whole.inputs.padding is not None
        assert torch.equal(whole.inputs.padding, padded)
    num_tokens, total = _alone(demo_model, store)
    assert found.num_tokens == num_tokens
    assert found.ce == pytest.approx(total / num_tokens, rel=1e-5)


def _alone(directory: Path, store: Any) -> tuple[int, float]:
    """Scored tokens and their summed −log p, document by document."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    arrays = (store.tokens(), store.documents(), store.token_flags())
    num_tokens, total = 0, 0.0
    for sequence in range(store.num_sequences):
        span = slice(sequence * LENGTH, (sequence + 1) * LENGTH)
        tokens, documents, flags = (array[span].astype(np.int64) for array in arrays)
        for document in np.unique(documents):
            mine = (documents == document) & (flags & PADDING == 0)
            ids, scored = torch.from_numpy(tokens[mine])[None], flags[mine][1:] == 0
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
            of_targets = log_p[torch.arange(len(log_p)), ids[0, 1:]].numpy()
            num_tokens += int(scored.sum())
            total -= float(of_targets[scored].sum())
    return num_tokens, total


@pytest.fixture(scope="module")
def encoder_world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random BERT and a store of it."""
    root = tmp_path_factory.mktemp("encoder")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForMaskedLM(config).save_pretrained(root / "model")
    transformer = load(root / "model")
    tokens = np.random.default_rng(0).integers(0, 50, 160)
    with create(
        root / "acts",
        tokens=tokens,
        context_length=16,
        layers=(0, 1),
        d_model=16,
        source={"model": transformer.describe()},
        provenance={"model": transformer.place()},
    ) as writer:
        inputs = Inputs(tokens=torch.from_numpy(tokens).reshape(-1, 16))
        captured = capture(transformer, inputs, (0, 1))
        writer.append({key: x.reshape(-1, 16).numpy() for key, x in captured.items()})
    return root / "model", root / "acts"


def test_an_encoder_has_every_table_but_no_cross_entropy(
    encoder_world: tuple[Path, Path],
    sae_maker: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, store = encoder_world
    sae = sae_maker(store)
    settings: dict[str, Any] = {"cache": store, "sae": sae, "rows": "all", "device": "cpu"}
    found = run(AnalyzeConfig(figures=False, **settings, out=tmp_path / "out"))
    reason = "the store's transformer is an encoder, which predicts no next token"
    assert found.summary["no_cross_entropy_because"] == reason
    assert f"CE was not measured: {reason}" in capsys.readouterr().out
    assert all(found.layers[name].null_count == 2 for name in CE_COLUMNS)
    assert found.layers["num_rows"].to_pylist() == [150, 150]
    assert found.events.count_rows() > 0
    with pytest.raises(InputError, match=rf"--model .*/model: {reason}; leave it out"):
        run(AnalyzeConfig(figures=False, **settings, out=tmp_path / "given", model=model))


def test_a_record_from_which_no_transformer_can_be_made_is_no_error(
    tmp_path: Path,
) -> None:
    """Whoever makes a store may name its model as they like."""
    with create(
        tmp_path / "acts",
        tokens=np.arange(40),
        context_length=8,
        layers=(0,),
        d_model=4,
        source={"model": {"fingerprint": "ab"}},
    ) as writer:
        writer.append({("resid_post", 0): np.ones((40, 4), np.float32)})
    store = open_store(tmp_path / "acts")
    assert find_transformer(store, "resid_post", find_places(store, None), torch.device("cpu")) == (
        None,
        "the store's record of its transformer lacks attention_implementation, blocks, "
        "config_sha256, dtype, init, init_seed, kind",
    )
