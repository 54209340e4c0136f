"""A store before its first shard, read: token arrays, calibration, and how rows are held."""

import numpy as np
import numpy.typing as npt

from mlsae.store.format.calibration import Calibration
from mlsae.store.format.encoding import SiteCalibration, SiteCodec
from mlsae.store.places.objects import Objects
from mlsae.store.plan import Plan
from mlsae.store.read.arrays import ArrayReader
from mlsae.store.schema import CHANNEL_MEAN, CHANNEL_SCALE


def token_readers(objects: Objects, plan: Plan) -> dict[str, ArrayReader]:
    """Readers of tokens, documents and token_flags, and of row_token where there is one."""
    return {spec.name: ArrayReader(objects, spec) for spec in plan.token_arrays}


def read_calibration(objects: Objects, plan: Plan) -> Calibration | None:
    """The calibration of an int8 store; None for other encodings.

    Raises:
        DamagedStoreError: the arrays differ from those that were written.
    """
    if plan.calibration is None:
        return None
    values: dict[str, npt.NDArray[np.float32]] = {
        spec.name: ArrayReader(objects, spec).read() for spec in plan.calibration_arrays
    }
    return Calibration(
        num_rows=plan.calibration.num_rows,
        sites={
            site: SiteCalibration(
                values[f"{CHANNEL_MEAN}/{site}"], values[f"{CHANNEL_SCALE}/{site}"]
            )
            for site in plan.sites
        },
    )


def site_codecs(plan: Plan, calibration: Calibration | None) -> dict[str, SiteCodec]:
    """Site → how its rows are held."""
    return {
        site: SiteCodec(
            plan.encoding, plan.d_model, None if calibration is None else calibration.sites[site]
        )
        for site in plan.sites
    }
