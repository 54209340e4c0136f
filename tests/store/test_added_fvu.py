"""The cost of an encoding equals its definition, and too high a cost stops the writer."""

from pathlib import Path

import numpy as np
import pytest

from mlsae.base.files import read_sealed
from mlsae.store import ActivationError, Calibrator, create, open_store
from mlsae.store.format.added_fvu import AddedFVU


def brute_force(x: np.ndarray, decoded: np.ndarray) -> float:
    """Σ‖x − decoded‖² / Σ‖x − mean‖², straight."""
    x = x.astype(np.float64)
    return float(((x - decoded) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def test_total_and_deciles_are_those_of_the_definition():
    """The deciles' edges are those of the first rows; later rows fall where their norms lie."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(3000, 12)) * generator.lognormal(size=(3000, 1)) + 30
    decoded = x + 0.01 * generator.normal(size=x.shape)
    measured = AddedFVU()
    for start, stop in ((0, 1000), (1000, 1001), (1001, 3000)):
        measured.add(x[start:stop], decoded[start:stop])
    measured.add(x[:0], decoded[:0])
    found = measured.result()
    assert found["num_rows"] == 3000
    assert found["total"] == pytest.approx(brute_force(x, decoded), rel=1e-9)
    norm = np.linalg.norm(x, axis=1)
    decile = np.searchsorted(np.quantile(norm[:1000], np.arange(1, 10) / 10), norm, "right")
    expected = [brute_force(x[decile == q], decoded[decile == q]) for q in range(10)]
    assert found["by_decile"] == pytest.approx(expected, rel=1e-9)


def test_rows_that_are_all_alike_have_no_variance_to_lose():
    """The share of nothing is not a number, so it is null."""
    measured = AddedFVU()
    measured.add(np.full((40, 3), 1e3), np.full((40, 3), 1e3))
    assert measured.result() == {"num_rows": 40, "total": None, "by_decile": [None] * 10}
    assert AddedFVU().result()["total"] is None


def rows_of(num_rows: int) -> np.ndarray:
    """Ordinary rows."""
    return np.random.default_rng(1).normal(size=(num_rows, 8)).astype(np.float32)


def test_the_writer_measures_eligible_rows_and_records_each_shard(tmp_path: Path):
    """Position 0 and flagged tokens are left out; the record is what brute force gives."""
    x = rows_of(96)
    x[::8] *= 1000
    flags = np.zeros(96, np.uint8)
    flags[5] = 1
    keys = [("resid_post", 0)]
    eligible = (flags == 0) & (np.arange(96) % 8 > 0)
    calibrator = Calibrator(keys, 8)
    calibrator.add({keys[0]: x[eligible]})
    with create(
        tmp_path / "a", tokens=np.zeros(96, int), context_length=8, layers=(0,), d_model=8,
        token_flags=flags, encoding="int8", calibration=calibrator.result(), shard_bytes=384,
    ) as writer:  # fmt: skip
        for start in range(0, 96, 24):
            writer.append({keys[0]: x[start : start + 24]})
    store = open_store(tmp_path / "a")
    assert store.shard_rows == 48
    for shard in (0, 1):
        record = read_sealed(tmp_path / f"a/commits/{shard:05d}.json")
        found = record["added_fvu"]["resid_post"]["0"]
        rows = np.arange(shard * 48, shard * 48 + 48)
        rows = rows[eligible[rows]]
        decoded = store.read("resid_post", 0)[rows]
        assert found["num_rows"] == len(rows)
        assert found["total"] == pytest.approx(brute_force(x[rows], decoded), rel=1e-6)
        assert 0 < found["total"] < 2e-4


def test_an_encoding_that_costs_too_much_stops_the_writer(tmp_path: Path):
    """One line with layer, shard and what to do; the store stays incomplete."""
    x = rows_of(64)
    message = (
        r"shard 0, layer 0 \(resid_post\): encoding bfloat16 adds an FVU of \S+ over all its rows, "
        r"more than 1e-07; use another --encoding, or allow it with --max-encoding-fvu"
    )
    with (
        pytest.raises(ActivationError, match=message),
        create(
            tmp_path / "a", tokens=np.zeros(64, int), context_length=8, layers=(0,), d_model=8,
            encoding="bfloat16", max_added_fvu=1e-7,
        ) as writer,
    ):  # fmt: skip
        writer.append({("resid_post", 0): x})
    assert not (tmp_path / "a/complete.json").exists()
    assert not (tmp_path / "a/commits/00000.json").exists()
    with create(
        tmp_path / "b", tokens=np.zeros(64, int), context_length=8, layers=(0,), d_model=8,
        encoding="float32", max_added_fvu=0.0,
    ) as writer:  # fmt: skip
        writer.append({("resid_post", 0): x})
    assert read_sealed(tmp_path / "b/commits/00000.json")["added_fvu"] is None
