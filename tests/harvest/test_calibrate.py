"""Scales for int8 come from the first rows that training would use."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mlsae.base.errors import InputError
from mlsae.harvest.compute import calibrate as module
from mlsae.harvest.compute.batches import Batches
from mlsae.harvest.compute.calibrate import calibrate
from mlsae.models import Transformer, load
from mlsae.models.capture import capture
from mlsae.models.inputs import Inputs
from mlsae.store import SPECIAL, Calibration, Calibrator
from mlsae.store.format.positions import kept_positions
from mlsae.store.plan import KeptPositions

LENGTH, SEQUENCES = 16, 20
TOKENS = np.random.default_rng(0).integers(1, 52, LENGTH * SEQUENCES, dtype=np.uint32)
FLAGS = np.where(TOKENS < 6, SPECIAL, 0).astype(np.uint8)
BATCHES = Batches(
    tokens=lambda start, stop: TOKENS[start:stop],
    documents=None,
    token_flags=None,
    context_length=LENGTH,
    batch_sequences=3,
)


@pytest.fixture(scope="module")
def transformer(model: Path) -> Transformer:
    return load(model)


@pytest.fixture(scope="module")
def rows(transformer: Transformer) -> np.ndarray:
    """(layers 1 and 3, tokens, 32) float64."""
    tokens = torch.from_numpy(TOKENS.astype(np.int64)).reshape(SEQUENCES, LENGTH)
    captured = capture(transformer, Inputs(tokens=tokens), (1, 3))
    return np.stack([x.reshape(-1, 32).double().numpy() for x in captured.values()])


@pytest.fixture
def needing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Another number of rows, for 4,096 of a small model would take long."""

    def act(num_rows: int) -> None:
        monkeypatch.setattr(module, "CALIBRATION_ROWS", num_rows)
        monkeypatch.setattr("mlsae.store.format.calibration.CALIBRATION_ROWS", num_rows)

    return act


def assert_by_rows(found: Calibration, rows: np.ndarray, *pieces: np.ndarray) -> None:
    """As the store's own of these rows, in these pieces."""
    calibrator = Calibrator([("resid_post", 1), ("resid_post", 3)], 32)
    for chosen in pieces:
        calibrator.add({("resid_post", 1): rows[0, chosen], ("resid_post", 3): rows[1, chosen]})
    expected = calibrator.result()
    assert found.num_rows == expected.num_rows
    for ours, theirs in ((f, expected.sites[site]) for site, f in found.sites.items()):
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours.scale, theirs.scale, rtol=1e-5)


def test_short_text_gives_all_its_eligible_rows(transformer: Transformer, rows: np.ndarray) -> None:
    found = calibrate(transformer, BATCHES, FLAGS, (1, 3), ("resid_post",))
    eligible = np.flatnonzero((FLAGS == 0) & (np.arange(len(FLAGS)) % LENGTH > 0))
    first = eligible < 3 * LENGTH
    assert_by_rows(found, rows, eligible[first], eligible[~first])


def test_first_batches_are_enough_and_the_last_is_sampled_evenly(
    transformer: Transformer,
    rows: np.ndarray,
    needing: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PIECE_ROWS", 7)
    eligible = np.flatnonzero((FLAGS == 0) & (np.arange(len(FLAGS)) % LENGTH > 0))
    first = eligible[eligible < 3 * LENGTH]
    second = eligible[(eligible >= 3 * LENGTH) & (eligible < 6 * LENGTH)]
    needing(len(first) + 10)
    seen: list[int] = []
    handle = transformer.blocks[0].register_forward_pre_hook(lambda *_: seen.append(1))
    found = calibrate(transformer, BATCHES, FLAGS, (1, 3), ("resid_post",))
    handle.remove()
    assert len(seen) == 2
    spread = second[np.arange(10) * len(second) // 10]
    assert np.ptp(spread) > 2 * LENGTH
    assert_by_rows(found, rows, first[:7], first[7:], spread)


def test_only_stored_positions_count(transformer: Transformer, rows: np.ndarray) -> None:
    kept = replace(BATCHES, keep=KeptPositions(num=5, seed=7))
    found = calibrate(transformer, kept, FLAGS, (1, 3), ("resid_post",))
    positions = kept_positions(7, 0, SEQUENCES, LENGTH, 5)
    tokens = (positions + LENGTH * np.arange(SEQUENCES)[:, None]).reshape(-1)
    eligible = tokens[(FLAGS[tokens] == 0) & (tokens % LENGTH > 0)]
    first = eligible < 3 * LENGTH
    assert_by_rows(found, rows, eligible[first], eligible[~first])


def test_text_without_an_eligible_row_is_refused(transformer: Transformer) -> None:
    with pytest.raises(InputError, match="int8 needs eligible rows to calibrate its scales"):
        calibrate(transformer, BATCHES, np.full_like(FLAGS, SPECIAL), (1,), ("resid_post",))


def test_value_that_is_not_finite_is_refused_with_its_layer(model: Path) -> None:
    broken = load(model)
    with torch.no_grad():
        broken.model.gpt_neox.layers[3].mlp.dense_4h_to_h.bias[3] = float("inf")
    with pytest.raises(InputError, match=r"layer 3 \(resid_post\) gives values that are not fin"):
        calibrate(broken, BATCHES, FLAGS, (1, 3), ("resid_post",))
