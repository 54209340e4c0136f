"""Added FVU measured on the device, against `mlsae.store`'s and a brute force in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mlsae.harvest.compute import codecs as module
from mlsae.harvest.compute.added_fvu import RunningFVU
from mlsae.harvest.compute.codecs import Codecs, codecs_for
from mlsae.store import Calibrator
from mlsae.store.format.added_fvu import AddedFVU

SITES, LAYERS, WIDTH = ("resid_post",), (0, 3), 70
KEYS = [("resid_post", 0), ("resid_post", 3)]
Rows = dict[tuple[str, int], np.ndarray]
Measure = Callable[[Codecs, list[tuple[np.ndarray, Rows]]], Any]


def hard_rows(num_rows: int, seed: int, shift: float = 0.0) -> Rows:
    generator = np.random.default_rng(seed)
    x = generator.standard_t(4, size=(num_rows, WIDTH)) * np.linspace(0.2, 3, WIDTH) + 5 + shift
    x[:, 40] *= 100
    x[generator.random(num_rows) < 0.01] *= 50
    return {KEYS[0]: x.astype(np.float32), KEYS[1]: (1e-3 * x[:, ::-1]).astype(np.float32)}


def groups_of(num_rows: int) -> np.ndarray:
    """Special rows, first positions, and the rest."""
    group = np.full(num_rows, 19, np.int8)
    group[::16] = 3
    group[1::16] = 4
    group[7::50] = 0
    return group


@pytest.fixture(params=[1 << 18, 1 << 12])
def measure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Some batches of a shard, in one piece and in many."""
    monkeypatch.setitem(module.PIECE_VALUES, "cpu", request.param)

    def act(codecs: Codecs, batches: list[tuple[np.ndarray, Rows]]) -> Any:
        cost = RunningFVU(codecs, WIDTH)
        for group, rows in batches:
            tensors = {key: torch.from_numpy(x) for key, x in rows.items()}
            stored = {key: codecs[key].encode(x).parts for key, x in tensors.items()}
            cost.add(group, tensors, stored)
        return cost.take()

    return act


def decoded(codecs: Codecs, key: tuple[str, int], x: np.ndarray) -> np.ndarray:
    out = torch.empty(x.shape)
    codecs[key].decode_into(codecs[key].encode(torch.from_numpy(x)).parts, out)
    return out.numpy()


def int8_codecs() -> Codecs:
    calibrator = Calibrator(KEYS, WIDTH)
    calibrator.add(hard_rows(4096, 9))
    return codecs_for("int8", SITES, LAYERS, WIDTH, calibrator.result())


def brute_force(x: np.ndarray, y: np.ndarray) -> float:
    """Design: Σ‖x − decoded‖² over Σ‖x − mean‖², float64."""
    x, y = x.astype(float), y.astype(float)
    return float(((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def test_int8_is_measured_over_all_eligible_rows_of_a_shard(measure: Measure) -> None:
    """As the store would, and as a brute force says; the later batches drift and are larger."""
    codecs = int8_codecs()
    batches = [
        (groups_of(n), hard_rows(n, seed, shift))
        for n, seed, shift in ((900, 0, 0.0), (1100, 1, 3.0), (40, 2, -3.0))
    ]
    found = measure(codecs, batches)
    assert found is not None
    for key in KEYS:
        reference = AddedFVU()
        pairs = []
        for group, rows in batches:
            x, y = rows[key][group >= 4], decoded(codecs, key, rows[key])[group >= 4]
            reference.add(x, y)
            pairs.append((x, y))
        ours, theirs = found["resid_post"][str(key[1])], reference.result()
        assert ours["num_rows"] == theirs["num_rows"] == sum(len(x) for x, _ in pairs)
        assert ours["total"] == pytest.approx(theirs["total"], rel=1e-5)
        assert ours["by_decile"] == pytest.approx(theirs["by_decile"], rel=1e-5)
        x, y = (np.concatenate(both) for both in zip(*pairs, strict=True))
        assert ours["total"] == pytest.approx(brute_force(x, y), rel=1e-5)
        edges = np.quantile(
            np.linalg.norm(pairs[0][0].astype(float), axis=1), np.arange(0.1, 1, 0.1)
        )
        top = np.linalg.norm(x.astype(float), axis=1) >= edges[-1]
        assert ours["by_decile"][-1] == pytest.approx(brute_force(x[top], y[top]), rel=1e-5)


@pytest.mark.parametrize("encoding", ["float16", "bfloat16"])
def test_rounding_is_measured_on_the_first_batch_alone(encoding: str, measure: Measure) -> None:
    codecs = codecs_for(encoding, SITES, LAYERS, WIDTH, None)
    first, second = (groups_of(900), hard_rows(900, 0)), (groups_of(900), hard_rows(900, 1))
    assert measure(codecs, [first, second]) == (found := measure(codecs, [first]))
    assert found is not None
    group, rows = first
    for key in KEYS:
        x, y = rows[key][group >= 4], decoded(codecs, key, rows[key])[group >= 4]
        assert found["resid_post"][str(key[1])]["total"] == pytest.approx(
            brute_force(x, y), rel=1e-5
        )


def test_nothing_is_measured_where_nothing_changes(measure: Measure) -> None:
    codecs = codecs_for("float32", SITES, LAYERS, WIDTH, None)
    assert measure(codecs, [(groups_of(50), hard_rows(50, 0))]) is None
    cost = RunningFVU(codecs, WIDTH)
    half = {key: torch.from_numpy(x).half() for key, x in hard_rows(50, 0).items()}
    cost.add(groups_of(50), half, {key: codecs[key].encode(x).parts for key, x in half.items()})
    widened = cost.take()
    assert widened is not None
    assert widened["resid_post"]["3"]["total"] == 0.0


def test_rows_that_no_one_trains_on_do_not_count(measure: Measure) -> None:
    codecs = codecs_for("float16", SITES, LAYERS, WIDTH, None)
    rows = hard_rows(200, 0)
    for x in rows.values():
        x[groups_of(200) < 4] = 60_000
    clean = hard_rows(200, 0)
    assert measure(codecs, [(groups_of(200), rows)]) == measure(codecs, [(groups_of(200), clean)])
    assert measure(codecs, [(np.zeros(200, np.int8), rows)]) is None


def test_rows_that_are_all_alike_have_no_variance(measure: Measure) -> None:
    """Neither to the bit nor but for the last bits of float32; beside others they still count."""
    codecs = codecs_for("bfloat16", SITES, LAYERS, WIDTH, None)
    group = np.full(1000, 19, np.int8)
    generator = np.random.default_rng(0)
    row = generator.normal(size=WIDTH) * 10
    for noise in (0.0, 1e-7):
        alike = (row * (1 + noise * generator.normal(size=(1000, WIDTH)))).astype(np.float32)
        found = measure(codecs, [(group, dict.fromkeys(KEYS, alike))])
        assert found is not None
        layer = found["resid_post"]["0"]
        assert layer == {"num_rows": 1000, "total": None, "by_decile": [None] * 10}
        mixed = alike.copy()
        mixed[900:] = 3 * generator.normal(size=(100, WIDTH))
        found = measure(codecs, [(group, dict.fromkeys(KEYS, mixed))])
        assert found is not None
        layer = found["resid_post"]["0"]
        deciles = layer["by_decile"]
        assert deciles[5] is None
        assert 1e-8 < deciles[0] < 1e-4
        expected = brute_force(mixed, decoded(codecs, KEYS[0], mixed))
        assert layer["total"] == pytest.approx(expected, rel=1e-4)


def test_two_kinds_of_equal_rows_have_variance_between_them_alone(measure: Measure) -> None:
    """Far from the centre, what float32 leaves of a sum of squares is no variance of a decile."""
    codecs = codecs_for("bfloat16", SITES, LAYERS, WIDTH, None)
    generator = np.random.default_rng(1)
    few, many = generator.normal(size=(2, WIDTH)).astype(np.float32) * [[1], [30]]
    x = np.where(np.arange(1000)[:, None] % 2, few, many).astype(np.float32)
    found = measure(codecs, [(np.full(1000, 19, np.int8), dict.fromkeys(KEYS, x))])
    layer = found["resid_post"]["0"]
    assert layer["by_decile"] == [None] * 10
    assert layer["total"] == pytest.approx(brute_force(x, decoded(codecs, KEYS[0], x)), rel=1e-5)
