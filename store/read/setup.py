"""A store before its first shard, read: token arrays, calibration, and how rows are held."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.store.format.calibration import Calibration
from mlsae.store.format.encoding import SiteCalibration, SiteCodec
from mlsae.store.format.positions import setup_arrays
from mlsae.store.places.objects import Objects
from mlsae.store.read.arrays import ArrayReader
from mlsae.store.schema import CHANNEL_MEAN, CHANNEL_SCALE, chunk_key


def setup_keys(plan: Mapping[str, Any]) -> list[str]:
    """Names of the shards that are written before the first activation."""
    keys = []
    for name, (_, length) in setup_arrays(plan).items():
        num_shards = -(-length // plan["token_shard"])
        keys += [f"{name}/{chunk_key(shard, 1)}" for shard in range(num_shards)]
    if plan["calibration"] is not None:
        for site in plan["sites"]:
            keys += [f"{name}/{site}/{chunk_key(0, 2)}" for name in (CHANNEL_MEAN, CHANNEL_SCALE)]
    return keys


def setup_readers(objects: Objects, plan: Mapping[str, Any]) -> dict[str, ArrayReader]:
    """Readers of tokens, documents and token_flags, and of row_token where there is one."""
    return {
        name: ArrayReader(
            objects,
            name,
            num_rows=length,
            row_shape=(),
            dtype=np.dtype(dtype),
            chunk_rows=plan["token_chunk"],
            shard_rows=plan["token_shard"],
        )
        for name, (dtype, length) in setup_arrays(plan).items()
    }


def read_calibration(objects: Objects, plan: Mapping[str, Any]) -> Calibration | None:
    """The calibration of an int8 store; None for other encodings.

    Raises:
        DamagedStoreError: its arrays are not those that were written.
    """
    if plan["calibration"] is None:
        return None
    shape = (len(plan["layers"]), plan["d_model"])

    def read(name: str, site: str) -> npt.NDArray[np.float32]:
        reader = ArrayReader(
            objects,
            f"{name}/{site}",
            num_rows=shape[0],
            row_shape=shape[1:],
            dtype="<f4",
            chunk_rows=shape[0],
            shard_rows=shape[0],
        )
        values: npt.NDArray[np.float32] = reader.read()
        return values

    return Calibration(
        num_rows=plan["calibration"]["num_rows"],
        sites={
            site: SiteCalibration(read(CHANNEL_MEAN, site), read(CHANNEL_SCALE, site))
            for site in plan["sites"]
        },
    )


def site_codecs(plan: Mapping[str, Any], calibration: Calibration | None) -> dict[str, SiteCodec]:
    """Site → how its rows are held."""
    return {
        site: SiteCodec(
            plan["encoding"],
            plan["d_model"],
            None if calibration is None else calibration.sites[site],
        )
        for site in plan["sites"]
    }
