"""A store that keeps some positions of each sequence, beside the store of all of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mlsae.analyze import Analysis, AnalyzeConfig, run
from mlsae.analyze.measure.model.cross_entropy import measure
from mlsae.analyze.pairing import pair
from mlsae.analyze.selection import read_rows
from mlsae.base.errors import InputError
from mlsae.models import load
from mlsae.sae import load as load_sae
from mlsae.store import SPECIAL, create, open_store
from mlsae.store.format.positions import kept_positions
from mlsae.store.read.split import validation_sequences

LENGTH, KEPT, SEED, NUM_SEQUENCES = 24, 7, 5, 20
CE_COLUMNS = ("num_ce_tokens", "ce", "ce_sae", "delta_ce", "kl")


@dataclass(frozen=True)
class Both:
    """One text in two stores, and one SAE's analysis of each, on the validation rows."""

    full: Path
    kept: Path
    kept_tokens: npt.NDArray[np.int64]
    """Token of each row of `kept`."""
    sae: Path
    of_full: Analysis
    of_kept: Analysis


@pytest.fixture(scope="module")
def both(
    harvested: Callable[..., Path],
    sae_maker: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Both:
    full, kept = harvested(), harvested(keep_positions=KEPT, keep_seed=SEED)
    positions = kept_positions(SEED, 0, NUM_SEQUENCES, LENGTH, KEPT)
    of_full, of_kept = (
        run(
            AnalyzeConfig(
                figures=False,
                cache=store,
                sae=sae_maker(store),
                out=tmp_path_factory.mktemp("out") / "out",
                batch_size=30,
                events_max_tokens=3 * LENGTH,
                device="cpu",
            )
        )
        for store in (full, kept)
    )
    return Both(
        full=full,
        kept=kept,
        kept_tokens=(positions + LENGTH * np.arange(NUM_SEQUENCES)[:, None]).ravel(),
        sae=sae_maker(full),
        of_full=of_full,
        of_kept=of_kept,
    )


def test_rows_and_their_tokens_are_the_kept_ones_of_the_full_store(both: Both) -> None:
    kept, full = open_store(both.kept), open_store(both.full)
    assert kept.num_rows == NUM_SEQUENCES * KEPT
    sequences = np.array([0, 3, 4, 19])
    parts = zip(*read_rows(kept, "resid_post", 2, sequences, 10), strict=True)
    rows, tokens, x = (np.concatenate(part) for part in parts)
    unflagged = full.token_flags()[both.kept_tokens] == 0
    expected = np.isin(both.kept_tokens // LENGTH, sequences) & unflagged
    np.testing.assert_array_equal(rows, np.flatnonzero(expected))
    np.testing.assert_array_equal(tokens, both.kept_tokens[expected])
    np.testing.assert_allclose(x, full.read("resid_post", 2)[tokens], rtol=1e-6, atol=1e-6)


def test_events_are_those_of_the_kept_tokens(both: Both) -> None:
    """They equal the full store's events at those tokens, and each has its token."""
    full, kept = (
        analysis.events.to_table().to_pydict() for analysis in (both.of_full, both.of_kept)
    )
    assert full["row"] == full["token"]
    np.testing.assert_array_equal(both.kept_tokens[kept["row"]], kept["token"])
    wanted = np.isin(full["token"], both.kept_tokens)
    assert 0 < wanted.sum() < len(wanted)
    for name in ("token", "layer", "latent"):
        np.testing.assert_array_equal(kept[name], np.array(full[name])[wanted])
    np.testing.assert_allclose(kept["value"], np.array(full["value"])[wanted], rtol=1e-4)
    held_out = validation_sequences(open_store(both.full).plan.tokens_sha256, NUM_SEQUENCES, 0.2, 3)
    assert set(np.array(kept["token"]) // LENGTH) == set(held_out[:3].tolist())


def test_figures_of_rows_are_over_the_kept_ones(both: Both, dense: Any) -> None:
    """FVU and counts, with position 0 in and out, in float64."""
    store, sae = open_store(both.full), dense(load_sae(both.sae))
    held_out = validation_sequences(store.plan.tokens_sha256, NUM_SEQUENCES, 0.2, 3)
    tokens = both.kept_tokens[np.isin(both.kept_tokens // LENGTH, held_out)]
    tokens = tokens[store.token_flags()[tokens] == 0]
    assert (tokens % LENGTH == 0).any()
    for row in both.of_kept.layers.to_pylist():
        for suffix, first in (("", 1), ("_position_0_in", 0), ("_position_0_out", 1)):
            chosen = tokens[tokens % LENGTH >= first]
            x = store.read("resid_post", row["layer"])[chosen].astype(np.float64)
            error = ((x - sae.reconstruction(x)) ** 2).sum()
            assert row[f"num_rows{suffix}"] == len(chosen)
            fvu = error / ((x - x.mean(axis=0)) ** 2).sum()
            assert row[f"fvu{suffix}"] == pytest.approx(fvu, rel=1e-4)


def test_cross_entropy_is_that_of_the_full_store_but_for_the_stored_activations(
    both: Both,
) -> None:
    for of_full, of_kept in zip(
        both.of_full.layers.to_pylist(), both.of_kept.layers.to_pylist(), strict=True
    ):
        for name in CE_COLUMNS:
            assert of_kept[name] == pytest.approx(of_full[name], abs=1e-6), name
        assert abs(of_kept["delta_ce"]) > 1e-3
        assert of_full["ce_store"] is not None
        assert of_kept["ce_store"] is None
    kept, unmeasured = both.of_kept.summary["notes"]
    assert kept.startswith("the store keeps 7 of the 24 positions of each sequence, ")
    assert unmeasured.startswith("ce_store was not measured: ")
    assert both.of_kept.summary["rows_per_sequence"] == KEPT
    assert both.of_full.summary["notes"] == []


def test_splicing_the_exact_activation_costs_exactly_nothing(
    both: Both, demo_model: Path, sae_maker: Callable[..., Path]
) -> None:
    pairing = pair(both.kept, sae_maker(both.kept), torch.device("cpu"))
    found = measure(
        load(demo_model),
        replace(pairing, sae=lambda x, _layer: x),  # type: ignore[arg-type]
        np.array([1, 5, 6]),
        batch_rows=2 * LENGTH,
        progress=lambda _n: None,
    )
    assert found is not None
    assert found.delta_ce.tolist() == found.kl.tolist() == [0.0, 0.0]
    assert found.ce_store is None


def test_rows_are_counted_by_the_flags_and_positions_of_their_tokens(
    sae_maker: Callable[..., Path], tmp_path: Path
) -> None:
    """Only the first row of each sequence has no flag: it is eligible unless at position 0."""
    positions = kept_positions(0, 0, 5, 8, 3)
    at_0 = positions[:, 0] == 0
    assert 0 < at_0.sum() < 5
    flags = np.full((5, 8), SPECIAL, np.uint8)
    flags[np.arange(5), positions[:, 0]] = 0
    free = np.zeros((5, 8), np.uint8)
    np.put_along_axis(free, positions, SPECIAL, axis=1)
    free[:, 0] = 0
    values = np.random.default_rng(0).normal(size=(15, 4)).astype(np.float32)
    configs = []
    for name, token_flags in (("first", flags), ("none", free)):
        with create(
            tmp_path / name,
            tokens=np.arange(40),
            context_length=8,
            layers=(0,),
            d_model=4,
            keep_positions=3,
            token_flags=token_flags.ravel(),
        ) as writer:
            writer.append({("resid_post", 0): values})
        configs.append(
            AnalyzeConfig(
                figures=False,
                cache=tmp_path / name,
                sae=sae_maker(tmp_path / name),
                out=tmp_path / f"{name}-out",
                rows="all",
                device="cpu",
            )
        )
    (row,) = run(configs[0]).layers.to_pylist()
    assert row["num_rows"] == (~at_0).sum()
    assert row["num_rows_position_0_in"] == 5
    with pytest.raises(InputError, match="none of the 15 rows chosen is eligible"):
        run(configs[1])
