"""Channel means and scales for int8, from the first rows that a producer computes.

A channel's scale is its mean absolute deviation a, which a few rows fifty times the others hardly
move. Of a channel that moves more than the layer's median it is (a² · median)^(1/3): finer than its
share, because such a channel decides the norm, and rows of one decile of norm differ in it but
little; and not so fine that the channels of its block would notice. No scale is below 1e-6 of the
layer's largest, so that a channel that never moved is still held. What the scales leave of outliers
of rows and blocks is the business of the exponents: see storage_schema.md.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.errors import InputError
from mlsae.base.words import Key
from mlsae.store.format.encoding import SiteCalibration

CALIBRATION_ROWS = 4096
"""Eligible rows that a calibration needs, where there are so many."""
_LEAST_OF_LARGEST = 1e-6


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration of a store, site by site."""

    num_rows: int
    """Rows that the calibration was computed from."""
    sites: Mapping[str, SiteCalibration]

    def sha256(self) -> str:
        """Hex SHA-256 of the means, then the scales, site after site, as stored."""
        digest = hashlib.sha256()
        for of_site in self.sites.values():
            for values in (of_site.mean, of_site.scale):
                digest.update(np.ascontiguousarray(values, "<f4").data)
        return digest.hexdigest()


class Calibrator:
    """Takes rows until there are enough. Sums are kept in float64.

    Args:
        keys: (site, layer) of every array, in the plan's order.
        d_model: channels.
    """

    def __init__(self, keys: Iterable[Key], d_model: int) -> None:
        self._keys = list(keys)
        self._first_D = {key: np.zeros(d_model) for key in self._keys}
        self._deviation_D = {key: np.zeros(d_model) for key in self._keys}
        self._about_D: dict[Key, npt.NDArray[np.float64]] = {}
        self.num_rows = 0

    @property
    def is_ready(self) -> bool:
        """True once there are enough rows."""
        return self.num_rows >= CALIBRATION_ROWS

    def add(self, rows: Mapping[Key, npt.NDArray[Any]]) -> None:
        """Add eligible rows: (site, layer) → (N, D) floats, equally many of each.

        Raises:
            InputError: a value is not finite; the message names site and layer.
        """
        num_rows = len(rows[self._keys[0]])
        if num_rows == 0:
            return
        for key in self._keys:
            x_ND = rows[key].astype(np.float64)
            if not np.isfinite(x_ND).all():
                raise InputError(
                    f"layer {key[1]} ({key[0]}) gives values that are not finite in the rows that "
                    f"calibrate int8"
                )
            # About a point near the mean, so that nothing cancels.
            about_D = self._about_D.setdefault(key, x_ND.mean(axis=0))
            x_ND -= about_D
            self._first_D[key] += x_ND.sum(axis=0)
            self._deviation_D[key] += np.abs(x_ND).sum(axis=0)
        self.num_rows += num_rows

    def result(self) -> Calibration:
        """The calibration by the rows so far; deviations are from the mean of the first added.

        Raises:
            InputError: there are none.
        """
        if self.num_rows == 0:
            raise InputError(
                "int8 needs eligible rows to calibrate its scales, and the text has none: every "
                "token is special, padding, masked or the first of its sequence"
            )
        sites: dict[str, list[tuple[Any, Any]]] = {}
        for key in self._keys:
            offset_D = self._first_D[key] / self.num_rows
            scale_D = _scales(self._deviation_D[key] / self.num_rows)
            sites.setdefault(key[0], []).append((self._about_D[key] + offset_D, scale_D))
        return Calibration(
            num_rows=self.num_rows,
            sites={
                site: SiteCalibration(
                    np.stack([mean for mean, _ in layers]).astype(np.float32),
                    np.stack([scale for _, scale in layers]).astype(np.float32),
                )
                for site, layers in sites.items()
            },
        )


def _scales(deviation_D: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    moving = deviation_D[deviation_D > 0]
    if not len(moving):
        return np.ones_like(deviation_D)
    typical = float(np.median(moving))
    scale_D = np.where(
        deviation_D > typical, np.cbrt(np.square(deviation_D) * typical), deviation_D
    )
    largest = float(scale_D.max())
    floor = max(largest * _LEAST_OF_LARGEST, float(np.finfo(np.float32).tiny))
    return np.maximum(scale_D, floor)


def check_calibration(
    calibration: Calibration | None, encoding: str, sites: Iterable[str], shape_LD: tuple[int, int]
) -> None:
    """Refuse a calibration that int8 cannot use, or that no other encoding needs.

    Raises:
        InputError: the calibration does not fit; the message names the fault.
    """
    if encoding != "int8":
        if calibration is not None:
            raise InputError(f"encoding {encoding} takes no calibration; leave it out")
        return
    if calibration is None:
        raise InputError(
            "encoding int8 needs a calibration: give its Calibrator eligible rows first, at least "
            f"{CALIBRATION_ROWS:,} where there are so many"
        )
    if list(calibration.sites) != list(sites):
        raise InputError(
            f"the calibration must be of the sites {', '.join(sites)}, got "
            f"{', '.join(calibration.sites)}"
        )
    for site, of_site in calibration.sites.items():
        for values in (of_site.mean, of_site.scale):
            if values.shape != shape_LD or values.dtype != np.float32:
                raise InputError(
                    f"the calibration of {site} must be float32 of shape {shape_LD}, got "
                    f"{values.dtype.name} of shape {values.shape}"
                )
            if not np.isfinite(values).all():
                raise InputError(f"the calibration of {site} holds a value that is not finite")
        if not (of_site.scale > 0).all():
            raise InputError(f"the calibration of {site} holds a scale that is not above 0")
