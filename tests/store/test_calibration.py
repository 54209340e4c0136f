"""Scales for int8: means and deviations of the first rows, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from mlsae.base.errors import InputError
from mlsae.store import Calibration, Calibrator, create, open_store
from mlsae.store.format.encoding import SiteCalibration
from mlsae.store.plan import PlannedCalibration

KEYS = [("mlp_out", 1), ("mlp_out", 4), ("resid_post", 1), ("resid_post", 4)]
SHAPE = {"context_length": 8, "layers": (1, 4), "d_model": 6, "sites": ("mlp_out", "resid_post")}


def calibration_of(rows: dict[tuple[str, int], np.ndarray]) -> Calibration:
    """In unequal pieces."""
    calibrator = Calibrator(KEYS, 6)
    for start, stop in ((0, 1), (1, 30), (30, 30), (30, 64)):
        calibrator.add({key: values[start:stop] for key, values in rows.items()})
    return calibrator.result()


@pytest.fixture
def rows() -> dict[tuple[str, int], np.ndarray]:
    """A large mean, a channel that never moves and one a thousand times the others."""
    generator = np.random.default_rng(0)
    made = {key: generator.normal(size=(64, 6)).astype(np.float32) for key in KEYS}
    made["mlp_out", 4] += np.float32(1e4)
    made["resid_post", 1][:, 2] = 7.0
    made["resid_post", 4][:, 5] *= 1e3
    return made


def test_means_and_scales_are_those_of_the_rows(rows):
    """Against float64 in one go; a constant channel has a millionth of the largest scale, and one
    of a thousand times the others' deviation a hundred times their scale."""
    found = calibration_of(rows)
    assert found.num_rows == 64
    assert list(found.sites) == ["mlp_out", "resid_post"]
    for site, of_site in found.sites.items():
        for at, layer in enumerate((1, 4)):
            x = rows[site, layer].astype(np.float64)
            # The first piece that is added is one row.
            deviation = np.abs(x - x[0]).mean(0)
            typical = np.median(deviation[deviation > 0])
            large = deviation > typical
            expected = np.where(large, deviation ** (2 / 3) * typical ** (1 / 3), deviation)
            np.testing.assert_allclose(of_site.mean[at], x.mean(0), rtol=1e-6)
            np.testing.assert_allclose(
                of_site.scale[at], np.maximum(expected, 1e-6 * expected.max()), rtol=1e-6
            )
    large = found.sites["resid_post"].scale[1]
    assert 50 < large[5] / np.median(large[:5]) < 200
    assert not Calibrator(KEYS, 6).is_ready


def test_rows_that_never_move_have_scales_of_one():
    """Nothing is divided by 0."""
    calibrator = Calibrator([("resid_post", 0)], 3)
    calibrator.add({("resid_post", 0): np.full((5, 3), 2.0)})
    assert np.array_equal(calibrator.result().sites["resid_post"].scale, np.ones((1, 3)))


def test_what_was_calibrated_is_read_back(tmp_path: Path, rows):
    """The plan has its hash and number of rows; another calibration is another plan."""
    given = calibration_of(rows)
    with create(
        tmp_path / "a", tokens=np.arange(64), encoding="int8", calibration=given, **SHAPE
    ) as writer:
        writer.append(rows)
    store = open_store(tmp_path / "a")
    assert store.plan.calibration == PlannedCalibration(num_rows=64, sha256=given.sha256())
    for site in ("mlp_out", "resid_post"):
        assert np.array_equal(store.calibration.sites[site].mean, given.sites[site].mean)
        assert np.array_equal(store.calibration.sites[site].scale, given.sites[site].scale)


def changed(calibration: Calibration, **fields: np.ndarray) -> Calibration:
    """With other arrays for one site."""
    of_site = calibration.sites["mlp_out"]
    kept = {"mean": of_site.mean, "scale": of_site.scale}
    sites = {**calibration.sites, "mlp_out": SiteCalibration(**{**kept, **fields})}
    return Calibration(num_rows=calibration.num_rows, sites=sites)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, "encoding int8 needs a calibration: give its Calibrator eligible rows"),
        (
            lambda c: changed(c, scale=np.zeros((2, 6), np.float32)),
            "the calibration of mlp_out holds a scale that is not above 0",
        ),
        (
            lambda c: changed(c, mean=np.full((2, 6), np.nan, np.float32)),
            "the calibration of mlp_out holds a value that is not finite",
        ),
        (
            lambda c: changed(c, mean=np.zeros((2, 5), np.float32)),
            r"must be float32 of shape \(2, 6\), got float32 of shape \(2, 5\)",
        ),
        (
            lambda c: Calibration(num_rows=1, sites={"mlp_out": c.sites["mlp_out"]}),
            "must be of the sites mlp_out, resid_post, got mlp_out",
        ),
    ],
)
def test_calibrations_that_cannot_be_used_are_refused(tmp_path: Path, rows, change, message):
    """Before anything is made."""
    given = change(calibration_of(rows))
    with pytest.raises(InputError, match=message):
        create(tmp_path / "a", tokens=np.arange(64), encoding="int8", calibration=given, **SHAPE)
    assert not (tmp_path / "a").exists()


def test_floats_take_no_calibration_and_no_rows_make_none(tmp_path: Path, rows):
    """Each in one line."""
    with pytest.raises(InputError, match="encoding float16 takes no calibration; leave it out"):
        create(tmp_path / "a", tokens=np.arange(64), calibration=calibration_of(rows), **SHAPE)
    with pytest.raises(InputError, match="int8 needs eligible rows to calibrate its scales, and"):
        Calibrator(KEYS, 6).result()
    rows["resid_post", 4][3, 3] = np.inf
    with pytest.raises(InputError, match=r"layer 4 \(resid_post\) gives values that are not fin"):
        calibration_of(rows)
