"""Scales for int8 from the first batches of the text, before anything is planned."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from mlsae.harvest.compute.batches import Batches, TextBatch
from mlsae.harvest.compute.forward import memory_explained, stored_rows
from mlsae.models import Transformer
from mlsae.models.capture import capture
from mlsae.store import Calibration, Calibrator
from mlsae.store.format.calibration import CALIBRATION_ROWS
from mlsae.store.format.moments import eligible_groups, group_of_rows

PIECE_ROWS = 1 << 10
"""Rows of every layer that are on the host at once."""


def calibrate(
    transformer: Transformer,
    batches: Batches,
    token_flags: npt.NDArray[np.uint8],
    layers: Sequence[int],
    sites: Sequence[str],
) -> Calibration:
    """Find channel means and scales from the first rows that training would use.

    Batches are computed until they hold 4,096 eligible rows (no flag, position 1 or later). Rows
    spread evenly over the last batch fill up the number. A shorter text gives all its rows.

    Args:
        transformer: as it will compute the store.
        batches: as the store will cut them.
        token_flags: (num_tokens,) of the whole text.
        layers: layers of the store.
        sites: sites of the store.

    Raises:
        InputError: the text has no eligible row, or a value is not finite.
        ResourceError: the device has too little memory for such a batch.
    """
    calibrator = Calibrator(
        [(site, layer) for site in sites for layer in layers], transformer.d_model
    )
    num_sequences = len(token_flags) // batches.context_length
    for start in range(0, num_sequences, batches.batch_sequences):
        batch = batches.batch(start, min(batches.batch_sequences, num_sequences - start))
        chosen = _eligible(batch, token_flags, batches.context_length)
        missing = CALIBRATION_ROWS - calibrator.num_rows
        if len(chosen) > missing:
            chosen = chosen[np.arange(missing) * len(chosen) // missing]
        _add(calibrator, transformer, batch, chosen, layers, sites)
        if calibrator.is_ready:
            break
    return calibrator.result()


def _eligible(
    batch: TextBatch, token_flags: npt.NDArray[np.uint8], context_length: int
) -> npt.NDArray[np.int64]:
    """Indices of the eligible rows among those that a batch stores."""
    tokens = batch.inputs.first_token + batch.rows
    groups = group_of_rows(token_flags[tokens], tokens % context_length)
    return np.flatnonzero(groups >= eligible_groups(1)[0])


def _add(
    calibrator: Calibrator,
    transformer: Transformer,
    batch: TextBatch,
    chosen: npt.NDArray[np.int64],
    layers: Sequence[int],
    sites: Sequence[str],
) -> None:
    with memory_explained(batch.inputs.tokens.shape[0]), torch.inference_mode():
        captured = capture(transformer, batch.inputs, layers, sites)
        rows = {key: stored_rows(x_BTd, batch.rows) for key, x_BTd in captured.items()}
        for start in range(0, len(chosen), PIECE_ROWS):
            piece = torch.from_numpy(chosen[start : start + PIECE_ROWS])
            calibrator.add(
                {
                    key: x_Nd[piece.to(x_Nd.device)].float().cpu().numpy()
                    for key, x_Nd in rows.items()
                }
            )
