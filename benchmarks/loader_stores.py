"""Stores and data sets for the loader's benchmark."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlsae.store import SPECIAL, create
from mlsae.store.format.calibration import Calibrator

SITE = "resid_post"
CONTEXT_LENGTH = 256
BATCH_SEQUENCES = 64
SEPARATOR_SHARE = 1e-3
"""Share of separators among tokens: one in a document of a thousand."""
RING = 3

Rows = npt.NDArray[np.float16]


def ring(num_layers: int, d_model: int) -> list[dict[tuple[str, int], Rows]]:
    """Batches that a store is made of, again and again: channels of many sizes."""
    generator = np.random.default_rng(0)
    shape = BATCH_SEQUENCES * CONTEXT_LENGTH, d_model
    made = []
    for _ in range(RING):
        batch = {}
        for layer in range(num_layers):
            scale = np.exp(0.5 * generator.standard_normal(d_model, np.float32))
            values = generator.standard_normal(shape, np.float32) * scale
            batch[SITE, layer] = values.astype(np.float16)
        made.append(batch)
    return made


def make_store(
    path: Path,
    *,
    num_layers: int,
    num_rows: int,
    d_model: int,
    encoding: str = "float16",
    compression: str = "none",
) -> Path:
    """A complete store of random activations; `num_rows` of each layer, whole batches."""
    batches = ring(num_layers, d_model)
    calibrator = Calibrator(batches[0], d_model)
    calibrator.add(batches[0])
    generator = np.random.default_rng(1)
    separators = generator.random(num_rows, np.float32) < SEPARATOR_SHARE
    with create(
        path,
        tokens=np.zeros(num_rows, np.uint32),
        token_flags=np.where(separators, SPECIAL, 0).astype(np.uint8),
        context_length=CONTEXT_LENGTH,
        layers=range(num_layers),
        d_model=d_model,
        encoding=encoding,
        compression=compression,
        calibration=calibrator.result() if encoding == "int8" else None,
        batch_sequences=BATCH_SEQUENCES,
    ) as writer:
        for batch in endless(batches):
            if writer.position is None:
                break
            writer.append(batch)
    return path


def endless(batches: list[dict[tuple[str, int], Rows]]) -> Iterator[dict[tuple[str, int], Rows]]:
    while True:
        yield from batches
