"""SAELens 6.54's reader of cached activations, made again from its documentation, with `datasets`.

Its cache is an Arrow data set on disk: one column of a hook's activations as Array2D
(context_length, d_in), in float32 unless asked otherwise, and one of token ids. It reads
`store_batch_size_prompts` = 32 neighbouring sequences at a time as torch tensors, in order, and
mixes them in a buffer of `n_batches_in_buffer` = 20 times `context_length` rows: what is read goes
to the end; a full buffer is shuffled whole, all but half of its rows are served in batches, and the
rest stays to be mixed with what comes next. There is one layer; rows that go nowhere else are not
filtered, so nothing is done here that it would not do.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import (
    Array2D,
    Dataset,
    Features,
    Sequence,
    Value,
    concatenate_datasets,
    disable_progress_bars,
    load_from_disk,
)

HOOK = "blocks.0.hook_resid_post"
PROMPTS = 32
BATCHES_IN_BUFFER = 20
MIX_FRACTION = 0.5


def write(path: Path, sequences: np.ndarray, dtype: str) -> None:
    """Cache (num_sequences, context_length, d_in) activations."""
    disable_progress_bars()
    _, length, width = sequences.shape
    features = Features(
        {
            HOOK: Array2D(shape=(length, width), dtype=dtype),
            "token_ids": Sequence(Value("int32"), length=length),
        }
    )
    pieces = []
    for start in range(0, len(sequences), PROMPTS):
        piece = sequences[start : start + PROMPTS].astype(dtype)
        tokens = np.zeros(piece.shape[:2], np.int32)
        pieces.append(Dataset.from_dict({HOOK: piece, "token_ids": tokens}, features=features))
    concatenate_datasets(pieces).save_to_disk(path)


def batches(path: Path, dtype: torch.dtype, batch_rows: int) -> Iterator[torch.Tensor]:
    """(batch_rows, d_in) without end."""
    data = load_from_disk(str(path))
    data.set_format("torch", columns=[HOOK, "token_ids"], device="cpu", dtype=dtype)
    length = data.features[HOOK].shape[0]
    size, kept = BATCHES_IN_BUFFER * length, int(BATCHES_IN_BUFFER * length * MIX_FRACTION)
    buffer: torch.Tensor | None = None
    while True:
        for start in range(0, len(data) - PROMPTS + 1, PROMPTS):
            new = data[start : start + PROMPTS][HOOK].reshape(PROMPTS * length, -1)
            buffer = new if buffer is None else torch.cat([buffer, new])
            if len(buffer) < size:
                continue
            buffer = buffer[torch.randperm(len(buffer))]
            served = max(1, (len(buffer) - kept) // batch_rows) * batch_rows
            serving, buffer = buffer[:served], buffer[served:]
            yield from serving.split(batch_rows)
