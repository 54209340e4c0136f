"""Analyses of several stores as one, and of stores elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from click.testing import CliRunner

from mlsae.analyze import Analysis, AnalyzeConfig, load, run
from mlsae.analyze.measure.model.cross_entropy import CrossEntropy, measure
from mlsae.analyze.pairing import pair
from mlsae.analyze.selection import choose_sequences
from mlsae.analyze.transformer import find_places, find_transformer
from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed, seal
from mlsae.cli import main
from mlsae.sae import load as load_sae
from mlsae.store import Store, open_corpus, open_store
from mlsae.store.read.corpus import sequence_origin

LENGTH = 24
CE = ("num_ce_tokens", "ce", "ce_store", "ce_sae", "delta_ce", "kl")


@pytest.fixture(scope="module")
def stores(harvested: Callable[..., Path]) -> tuple[Path, Path]:
    """Stores of the control: a token's noise depends on where it lies in its own store's text."""
    settings: dict[str, Any] = {"init": "control", "init_seed": 3}
    return harvested(**settings), harvested(**settings, shuffle_seed=1, max_tokens=9 * LENGTH)


@pytest.fixture(scope="module")
def sae(stores: tuple[Path, Path], sae_maker: Callable[..., Path]) -> Path:
    """As if it had been trained from both."""
    corpus = open_corpus(stores)
    return sae_maker(stores[0], store_id=corpus.store_id, stores=records(*corpus.stores))


def records(*stores: Store) -> list[dict[str, str]]:
    return [
        {"store_id": store.store_id, "tokens_sha256": store.plan.tokens_sha256} for store in stores
    ]


def entropy(cache: Any, sae: Path) -> CrossEntropy:
    pairing = pair(cache, sae, torch.device("cpu"))
    transformer, reason = find_transformer(
        pairing.store, pairing.site, find_places(pairing.store, None), pairing.device
    )
    assert transformer is not None, reason
    found = measure(
        transformer,
        pairing,
        np.arange(pairing.store.num_sequences),
        batch_rows=7 * LENGTH,
        progress=lambda _n: None,
    )
    assert found is not None
    return found


def test_every_store_of_a_corpus_is_run_as_it_was_harvested(
    stores: tuple[Path, Path], sae: Path
) -> None:
    """Stored rows cost nothing, in batches with sequences of both stores too; sums are of both."""
    found = entropy(stores, sae)
    np.testing.assert_allclose(found.ce_store, found.ce, atol=1e-5)
    alone = [entropy(path, sae) for path in stores]
    counts = [one.num_tokens for one in alone]
    assert found.num_tokens == sum(counts)
    for name in ("ce", "ce_sae", "delta_ce", "kl"):
        expected = np.average([getattr(one, name) for one in alone], axis=0, weights=counts)
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-5, err_msg=name)


def test_the_tables_of_a_corpus_are_of_all_its_rows(
    stores: tuple[Path, Path], sae: Path, dense: Callable[..., Any], tmp_path: Path
) -> None:
    """By the dense SAE on all rows at once; rows and tokens are counted through."""
    found = run(
        AnalyzeConfig(figures=False, cache=stores, sae=sae, out=tmp_path / "out", rows="all")
    )
    corpus = open_corpus(found.summary["cache"])
    assert [member.place for member in corpus.stores] == found.summary["cache"]
    assert found.summary["stores"] == [
        {"store_id": store.store_id, "num_sequences": store.num_sequences}
        for store in corpus.stores
    ]
    assert found.summary["store_id"] == corpus.store_id
    assert found.summary["notes"] == []
    eligible = corpus.eligible(1)
    reference = dense(load_sae(sae))
    for row in found.layers.to_pylist():
        x = corpus.read("resid_post", row["layer"]).astype(np.float64)[eligible]
        error = np.square(x - reference.reconstruction(x)).sum()
        assert row["num_rows"] == eligible.sum()
        assert row["fvu"] == pytest.approx(error / np.square(x - x.mean(0)).sum(), rel=1e-4)
        assert row["norm"] == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-5)
    events, first = [], 0
    for i, store in enumerate(corpus.stores):
        alone = run(
            AnalyzeConfig(
                figures=False, cache=store.place, sae=sae, out=tmp_path / f"{i}", rows="all"
            )
        )
        table = alone.events.to_table()
        for name in ("row", "token"):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, name, pc.add(table[name], first))
        events.append(table)
        first += store.num_tokens
    key = [("layer", "ascending"), ("row", "ascending"), ("latent", "ascending")]
    expected = pa.concat_tables(table.replace_schema_metadata() for table in events).sort_by(key)
    of_both = found.events.to_table().replace_schema_metadata().sort_by(key)
    assert of_both.select(["row", "token", "layer", "latent"]).equals(
        expected.select(["row", "token", "layer", "latent"])
    )
    np.testing.assert_allclose(of_both["value"], expected["value"], rtol=1e-4)


def analysis(cache: Any, sae: Path, out: Path, **more: Any) -> Analysis:
    return run(AnalyzeConfig(figures=False, cache=cache, sae=sae, out=out, **more))


@pytest.mark.parametrize("rows", ["validation", "train", "all"])
def test_the_rows_of_a_store_are_the_same_alone_and_in_a_corpus(
    rows: str, stores: tuple[Path, Path]
) -> None:
    corpus, split = open_corpus(stores), {"fraction": 0.2, "seed": 3}
    origin, own = sequence_origin(corpus, choose_sequences(corpus, rows, split, None))
    for i, store in enumerate(corpus.stores):
        alone = choose_sequences(store, rows, split, None)
        assert own[origin == i].tolist() == alone.tolist() != []


def test_what_was_trained_from_is_told_apart_from_what_is_analyzed(
    stores: tuple[Path, Path], sae: Path, sae_maker: Callable[..., Path]
) -> None:
    """A note where they differ, and another where text is new."""
    corpus = open_corpus(stores)
    first, second = corpus.stores
    ids = [store.store_id[:12] for store in corpus.stores]

    def notes(cache: Any, directory: Path) -> list[str]:
        return list(pair(cache, directory, torch.device("cpu")).notes)

    assert notes(stores, sae) == notes(reversed(stores), sae) == []
    (of_member,) = notes(second.place, sae)
    assert of_member == (
        f"the SAE was trained from stores {ids[0]}, {ids[1]} and is analyzed on store {ids[1]}"
    )
    of_first = sae_maker(Path(first.place), store_id=first.store_id, stores=records(first))
    of_more, of_text = notes(stores, of_first)
    assert of_more == (
        f"the SAE was trained from store {ids[0]} and is analyzed on stores {ids[0]}, {ids[1]}"
    )
    assert of_text.startswith(f"the text of store {ids[1]} is not that of training: the rows")
    same_text = {"store_id": "d" * 64, "tokens_sha256": second.plan.tokens_sha256}
    of_copy = sae_maker(Path(first.place), store_id="d" * 64, stores=[same_text])
    assert notes(second.place, of_copy) == [
        f"the SAE was trained from store dddddddddddd and is analyzed on store {ids[1]}"
    ]


def test_an_sae_that_names_one_store_and_its_text_can_be_analyzed(
    stores: tuple[Path, Path], sae_maker: Callable[..., Path]
) -> None:
    """As they were recorded before there were corpora."""
    store = open_store(stores[0])
    validation = {"fraction": 0.2, "seed": 3, "tokens_sha256": store.plan.tokens_sha256}
    directory = sae_maker(stores[0], validation=validation)
    record = directory / "training.json"
    content = read_sealed(record)
    del content["stores"]
    record.write_bytes(seal(content))
    assert pair(stores[0], directory, torch.device("cpu")).notes == ()


def test_stores_that_are_no_corpus_are_refused(
    stores: tuple[Path, Path], harvested: Callable[..., Path], sae: Path, tmp_path: Path
) -> None:
    trained = harvested(shuffle_seed=1)
    with pytest.raises(
        InputError, match=r"cannot be read as one: .*model init \w+ and \w+; model init_se"
    ):
        analysis((stores[0], trained), sae, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_remote_store_that_lists_itself_is_analyzed_as_the_local_one(
    stores: tuple[Path, Path],
    sae: Path,
    serve: Callable[[str, Path], str],
    tmp_path: Path,
) -> None:
    """The transformer is found by what the harvest noted."""
    local = analysis(stores[1], sae, tmp_path / "local")
    location = serve("hub", stores[1])
    found = analysis(location, sae, tmp_path / "remote", cache_dir=tmp_path / "kept")
    assert found.layers.equals(local.layers)
    assert found.layers["delta_ce"].null_count == 0
    assert found.summary["cache"][0].startswith(location)
    assert (tmp_path / "kept").exists()


def test_without_a_list_of_files_the_transformer_has_to_be_given(
    stores: tuple[Path, Path],
    sae: Path,
    demo_model: Path,
    serve: Callable[[str, Path], str],
    tmp_path: Path,
) -> None:
    """A web server lists nothing; a store beside it that does knows the transformer."""
    url = serve("web", stores[1])
    words = ["analyze", "--cache", url, "--sae", str(sae), "--cache-size", "0", "--no-figures"]
    words += ["--device", "cpu"]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "alone")])
    assert done.exit_code == 0, done.output
    alone = load(tmp_path / "alone")
    reason = alone.summary["no_cross_entropy_because"]
    assert reason.startswith("where the transformer lay is not known (http://127.0.0.1:")
    assert reason.endswith("does not list what it holds); give --model")
    assert f"CE was not measured: {reason}" in done.output
    assert all(alone.layers[name].null_count == len(alone.layers) for name in CE)
    words += ["--model", str(demo_model)]
    assert CliRunner().invoke(main, [*words, "--out", str(tmp_path / "given")]).exit_code == 0
    assert load(tmp_path / "given").layers["delta_ce"].null_count == 0
    words = [*words[:-2], "--cache", str(stores[0])]
    assert CliRunner().invoke(main, [*words, "--out", str(tmp_path / "both")]).exit_code == 0
    assert load(tmp_path / "both").layers["delta_ce"].null_count == 0
