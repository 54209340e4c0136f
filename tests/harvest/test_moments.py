"""Moments summed on devices, or by threads on the host, against a brute force in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mlsae.base.words import Key
from mlsae.harvest.compute import moments as module
from mlsae.harvest.compute.codecs import Codecs, codecs_for
from mlsae.harvest.compute.moments import RunningMoments
from mlsae.store.format.moments import GROUPS

LAYERS = (1, 4, 5)
SITES = ("resid_post", "mlp_out")
WIDTH = 24
Maker = Callable[[Codecs, tuple[str, ...], tuple[int, ...]], RunningMoments]


def hard_rows(generator: np.random.Generator, num_rows: int, group: np.ndarray) -> np.ndarray:
    """A channel a hundred times the others', rows fifty times, a group of equal rows."""
    x = generator.normal(size=(num_rows, WIDTH)).astype(np.float32) + 3
    x[:, 5] *= 100
    x[generator.random(num_rows) < 0.02] *= 50
    x[group == 3] = np.arange(WIDTH) * 7.25
    return x.astype(np.float16).astype(np.float32)


def standardize(x: np.ndarray) -> np.ndarray:
    """Design: (x − m) / (s + 1e-5), s unbiased, over a row's channels."""
    centred = x - x.mean(1, keepdims=True)
    return centred / (x.std(1, ddof=1, keepdims=True) + 1e-5)


@pytest.fixture(scope="module")
def batches() -> list[tuple[np.ndarray, dict[tuple[str, int], np.ndarray]]]:
    """Three batches; some groups are empty, one has a single row in all."""
    generator = np.random.default_rng(0)
    result = []
    for number, num_rows in enumerate((300, 40, 111)):
        group = generator.choice([0, 3, 5, 19], num_rows).astype(np.int8)
        if number == 1:
            group[0] = 2
        rows = {
            (s, layer): hard_rows(generator, num_rows, group) for s in SITES for layer in LAYERS
        }
        result.append((group, rows))
    return result


@pytest.fixture(params=["one run", "a run each", "1 thread", "3 threads"])
def begin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """In the calling thread, with all layers on a device or each on its own, or by threads.

    Each has several pieces of a group in each batch.
    """
    monkeypatch.setitem(module.PIECE_VALUES, "cpu", 0)
    first = request.param.split()[0]
    if request.param == "a run each":

        def alone(keys: list[Key], _: object) -> list[tuple[torch.device, list[Key]]]:
            return [(torch.device("cpu"), [key]) for key in keys]

        monkeypatch.setattr(module, "runs_of", alone)
    num_threads = int(first) if first.isdigit() else None
    return lambda codecs, sites, layers: RunningMoments(codecs, sites, layers, WIDTH, num_threads)


def test_sums_equal_brute_force_in_float64(
    begin: Maker,
    batches: list[tuple[np.ndarray, dict[tuple[str, int], np.ndarray]]],
) -> None:
    moments = begin(codecs_for("float32", SITES, LAYERS, WIDTH, None), SITES, LAYERS)
    for group, rows in batches:
        largest = moments.add(group, {key: (torch.from_numpy(x),) for key, x in rows.items()})
        assert {key: float(value) for key, value in largest.items()} == {
            key: float(np.abs(x).max()) for key, x in rows.items()
        }
    taken = moments.take()
    group = np.concatenate([group for group, _ in batches])
    for site in SITES:
        found = taken[site]
        x = {
            layer: np.concatenate([rows[site, layer] for _, rows in batches]).astype(float)
            for layer in LAYERS
        }
        np.testing.assert_array_equal(
            found.tensors()["count"], np.bincount(group, minlength=len(GROUPS))
        )
        for place, layer in enumerate(LAYERS):
            for g in np.unique(group):
                of_group = x[layer][group == g]
                for values, mean, m2 in (
                    (of_group, "mean", "m2"),
                    (standardize(of_group), "u_mean", "u_m2"),
                ):
                    spread = ((values - values.mean(0)) ** 2).sum(0)
                    scale = np.abs(values).max(0)
                    np.testing.assert_allclose(
                        found.tensors()[mean][place, g], values.mean(0), atol=1e-6 * scale.max()
                    )
                    error = np.abs(found.tensors()[m2][place, g] - spread)
                    # A float32 value is off by up to 2⁻²⁴ of its size, u by a few times that.
                    rounding = 4 * 2.0**-24 * scale * np.sqrt(len(values) * spread)
                    allowed = 2e-6 * spread + rounding + 1e-9 * scale**2
                    assert (error <= allowed).all(), (m2, g, error / allowed)
                norms = np.linalg.norm(of_group, axis=1).sum()
                assert found.tensors()["norm_sum"][place, g] == pytest.approx(norms, rel=1e-6)
                assert found.tensors()["max_abs"][place, g] == np.abs(of_group).max()
                if place + 1 < len(LAYERS):
                    above = x[LAYERS[place + 1]][group == g]
                    cross = ((of_group - of_group.mean(0)) * (above - above.mean(0))).sum()
                    size = np.linalg.norm(of_group) * np.linalg.norm(above)
                    assert found.tensors()["adjacent_cross"][place, g] == pytest.approx(
                        cross, rel=1e-5, abs=1e-7 * size
                    )


def test_take_begins_anew(
    begin: Maker,
    batches: list[tuple[np.ndarray, dict[tuple[str, int], np.ndarray]]],
) -> None:
    group, rows = batches[0]
    moments = begin(codecs_for("float32", SITES, LAYERS, WIDTH, None), SITES, LAYERS)
    tensors = {key: (torch.from_numpy(x),) for key, x in rows.items()}
    moments.add(group, tensors)
    first = moments.take()
    moments.add(group, tensors)
    again = moments.take()
    for site in SITES:
        for name, values in first[site].tensors().items():
            np.testing.assert_array_equal(values, again[site].tensors()[name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_value_that_is_not_finite_shows_in_the_largest(begin: Maker, bad: float) -> None:
    codecs = codecs_for("float32", ("resid_post",), (0,), WIDTH, None)
    moments = begin(codecs, ("resid_post",), (0,))
    x = torch.ones(99, WIDTH)
    x[70, 3] = bad
    largest = moments.add(np.zeros(99, np.int8), {("resid_post", 0): (x,)})
    assert not torch.isfinite(largest["resid_post", 0])


def test_threads_of_the_forward_pass_are_as_they_were() -> None:
    codecs = codecs_for("float32", ("resid_post",), (0,), WIDTH, None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        moments = RunningMoments(codecs, ("resid_post",), (0,), WIDTH, 3)
        moments.add(np.zeros(50, np.int8), {("resid_post", 0): (torch.ones(50, WIDTH),)})
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyError):
            moments.add(np.zeros(50, np.int8), {})
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
