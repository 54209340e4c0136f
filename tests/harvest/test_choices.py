"""Each choice of a harvest ends in a store that holds exactly what was chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mlsae.base.errors import InputError
from mlsae.base.words import SITES
from mlsae.harvest import HarvestConfig, run
from mlsae.harvest.shards import batches_of
from mlsae.models import load_for
from mlsae.models.capture import capture
from mlsae.store import PADDING, PlanMismatchError, Store, open_store
from mlsae.store.format.positions import kept_positions
from mlsae.store.tools.verify import verify

MakeConfig = Callable[..., HarvestConfig]


def harvested(config: HarvestConfig) -> Store:
    run(config)
    assert verify(config.out).problems == []
    return open_store(config.out)


def decoded(store: Store, site: str, layer: int) -> np.ndarray:
    return store.read(site, layer, 0, store.num_rows)


@pytest.fixture
def sequential(tmp_path: Path, tokenizer_maker: Callable[..., Any]) -> Path:
    """A small random Llama, which has every site."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=48,
        initializer_range=0.1,
    )  # fmt: skip
    directory = tmp_path / "llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer_maker().save_pretrained(directory)
    return directory


def test_all_sites_of_one_pass_fit_together(config: MakeConfig, sequential: Path) -> None:
    """Pre-LN: resid_pre + attn_out = resid_mid, + mlp_out = resid_post = the next resid_pre."""
    store = harvested(
        config(model=str(sequential), sites=SITES[::-1], encoding="float32", max_tokens=400)
    )
    assert store.sites == SITES
    for layer in store.layers:
        x = {site: decoded(store, site, layer) for site in SITES}
        for total, parts in (
            ("resid_mid", ("resid_pre", "attn_out")),
            ("resid_post", ("resid_mid", "mlp_out")),
        ):
            np.testing.assert_allclose(
                x[parts[0]] + x[parts[1]], x[total], rtol=1e-5, atol=1e-6, err_msg=total
            )
        if layer + 1 in store.layers:
            np.testing.assert_array_equal(x["resid_post"], decoded(store, "resid_pre", layer + 1))


def test_site_that_a_model_has_not_is_refused_before_anything_is_made(config: MakeConfig) -> None:
    settings = config(sites=("resid_mid",))
    with pytest.raises(InputError, match="has no resid_mid: in block 0 attention and MLP both re"):
        run(settings)
    assert not settings.out.exists()


@pytest.mark.parametrize(("num_kept", "batch_size"), [(5, 3), (1, 1)], ids=["some", "one row"])
def test_kept_positions_are_those_rows_of_the_full_store(
    num_kept: int,
    batch_size: int,
    config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Down to a row a batch."""
    some = {"batch_size": batch_size, "max_tokens": 640}
    full = harvested(config(out=tmp_path / "full", **some))
    kept = harvested(config(out=tmp_path / "kept", keep_positions=num_kept, keep_seed=3, **some))
    assert kept.num_tokens == full.num_tokens
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"{kept.num_tokens:,} tokens, {kept.num_rows:,} rows of each of 4 layers, in " in last
    assert kept.num_rows == full.num_sequences * num_kept
    positions = kept_positions(3, 0, full.num_sequences, 16, num_kept)
    tokens = (positions + np.arange(full.num_sequences)[:, None] * 16).reshape(-1)
    np.testing.assert_array_equal(kept.row_tokens(), tokens)
    for layer in full.layers:
        np.testing.assert_array_equal(
            decoded(kept, "resid_post", layer), decoded(full, "resid_post", layer)[tokens]
        )


def test_more_kept_positions_than_there_are_is_refused(config: MakeConfig) -> None:
    with pytest.raises(InputError, match="--keep-positions 17 is more than the 16 positions of a"):
        run(config(keep_positions=17))


def test_documents_apart_do_not_see_one_another(config: MakeConfig) -> None:
    """Each document's rows equal those of the document run alone from position 0."""
    store = harvested(config(isolate_documents=True, encoding="float32", max_tokens=160))
    model = load_for(store.source["model"], store.provenance()[0]["model"]["name"])
    documents = store.documents().reshape(-1, 16)
    tokens = store.tokens().reshape(-1, 16).astype(np.int64)
    found = decoded(store, "resid_post", 3).reshape(-1, 16, 32)
    several = 0
    for sequence in range(store.num_sequences):
        several += len(np.unique(documents[sequence])) > 1
        for document in np.unique(documents[sequence]):
            inside = documents[sequence] == document
            with torch.no_grad():
                alone = model.model(
                    torch.from_numpy(tokens[sequence][inside])[None], output_hidden_states=True
                ).hidden_states
            normed = model.backbone.final_layer_norm(torch.from_numpy(found[sequence][inside]))
            torch.testing.assert_close(normed, alone[-1][0], rtol=1e-4, atol=1e-4)
    assert several > 3


def test_one_document_a_sequence_is_padded_and_flagged(config: MakeConfig) -> None:
    store = harvested(config(packing="document", encoding="float32", max_tokens=160))
    flags = store.token_flags().reshape(-1, 16)
    assert (flags & PADDING).any()
    model = load_for(store.source["model"], store.provenance()[0]["model"]["name"])
    tokens = store.tokens().reshape(-1, 16).astype(np.int64)
    found = decoded(store, "resid_post", 1).reshape(-1, 16, 32)
    for sequence in range(store.num_sequences):
        real = int((flags[sequence] & PADDING == 0).sum())
        with torch.no_grad():
            alone = model.model(
                torch.from_numpy(tokens[sequence, :real])[None], output_hidden_states=True
            ).hidden_states[2]
        np.testing.assert_allclose(found[sequence, :real], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "init", ["rerandomized", "rerandomized-keep-embeddings", "random", "control"]
)
def test_every_initialisation_can_be_made_again_from_the_plan(
    init: str, config: MakeConfig, tmp_path: Path
) -> None:
    settings = config(init=init, init_seed=5, encoding="float32", max_tokens=160)
    store = harvested(settings)
    record = store.source["model"]
    assert (record["init"], record["init_seed"]) == (init, 5)
    model = load_for(record, settings.model)
    batch = batches_of(store).batch(3, 3)
    x = capture(model, batch.inputs, [2])["resid_post", 2].reshape(-1, 32).numpy()
    rows = slice(3 * 16, 6 * 16)
    np.testing.assert_array_equal(decoded(store, "resid_post", 2)[rows], x)
    other = harvested(
        config(out=tmp_path / "other", init=init, init_seed=6, encoding="float32", max_tokens=160)
    )
    assert other.plan_id != store.plan_id
    assert np.abs(decoded(other, "resid_post", 2) - decoded(store, "resid_post", 2)).max() > 0.1


def test_encoder_is_harvested(
    config: MakeConfig, tmp_path: Path, tokenizer_maker: Callable[..., Any]
) -> None:
    bert = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=48,
    )  # fmt: skip
    directory = tmp_path / "bert"
    transformers.BertForMaskedLM(bert).save_pretrained(directory)
    tokenizer_maker().save_pretrained(directory)
    store = harvested(config(model=str(directory), packing="document", max_tokens=160))
    assert store.source["model"]["kind"] == "encoder"


def test_batch_size_is_found_once_and_then_the_plans(
    config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(batch_size=None, shard_size=40_000)
    first = run(settings)
    chosen = open_store(settings.out).plan.batch_sequences
    # A shard of 40,000 bytes holds 39 sequences of 16 rows of 64 bytes.
    assert chosen == 32
    assert "sequences a forward pass: 32" in capsys.readouterr().out
    again = run(settings)
    assert again is not None
    assert first is not None
    assert again.store_id == first.store_id
    with pytest.raises(PlanMismatchError, match="batch_sequences: 32 there, 8 here"):
        run(config(batch_size=8, shard_size=40_000))


def test_another_plan_is_refused_before_text_is_read(config: MakeConfig) -> None:
    run(config(max_tokens=160))
    for change, text in (
        ({"context_length": 8}, "context_length: 16 there, 8 here"),
        ({"layers": (1,)}, r"layers: \[0, 1, 2, 3\] there, \[1\] here"),
        ({"sites": ("mlp_out",)}, r"sites: \['resid_post'\] there, \['mlp_out'\] here"),
        ({"keep_positions": 4}, "keep_positions: absent there, "),
        ({"encoding": "float32"}, "encoding: float16 there, float32 here"),
    ):
        with pytest.raises(PlanMismatchError, match=text):
            run(config(dataset="no/such/set", max_tokens=160, **change))


def test_other_hardware_is_refused_unless_it_is_allowed(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlsae.store.schema import COMPLETE, commit_record

    settings = config(max_tokens=500)
    first = run(settings)
    for record in (COMPLETE, commit_record(1)):
        (settings.out / record).unlink()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(InputError) as info:
        run(settings)
    assert "--allow-mixed-hardware" in str(info.value)
    assert "2.99.0" in str(info.value)
    result = run(config(max_tokens=500, allow_mixed_hardware=True))
    assert result is not None
    assert first is not None
    # Only the version's name had changed: the same CPU computes the same bytes.
    assert result.store_id == first.store_id


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"init": "zero"}, "--init must be trained, rerandomized, .*, got 'zero'"),
        ({"packing": "tight"}, "--packing must be auto, concatenate, document, rows, got 'tight'"),
        ({"bos": "maybe"}, "--bos must be auto, always, never, got 'maybe'"),
        ({"sites": ("resid",)}, "--sites must be different ones of resid_pre, .*, got resid$"),
        ({"sites": ("mlp_out", "mlp_out")}, "--sites must be different ones of"),
        ({"device_map": "balanced"}, "--device-map must be auto, got 'balanced'"),
        ({"device_map": "auto"}, "--device-map auto chooses the devices itself; leave out --dev"),
        ({"keep_positions": 0}, "--keep-positions must be at least 1, got 0"),
    ],
)
def test_impossible_choices_are_one_line(
    change: dict[str, Any], text: str, config: MakeConfig
) -> None:
    with pytest.raises(InputError, match=text):
        config(**change)


def test_device_map_gives_the_same_store(config: MakeConfig, tmp_path: Path) -> None:
    plain = harvested(config(max_tokens=160))
    mapped = harvested(
        config(out=tmp_path / "mapped", max_tokens=160, device="auto", device_map="auto")
    )
    assert mapped.store_id == plain.store_id
