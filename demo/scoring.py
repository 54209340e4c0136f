"""Cross-entropy of the demo transformer and of a unigram model.

Packed ids are cut into sequences of `context_length` (the incomplete last one is left out); every
token of a sequence but the first is a target. Both models are scored on the same targets.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int64]


def sequences(ids: Ids, context_length: int) -> Ids:
    """Whole sequences (num_sequences, context_length) of packed ids (num_tokens,)."""
    num_sequences = len(ids) // context_length
    return ids[: num_sequences * context_length].reshape(num_sequences, context_length)


@torch.no_grad()
def cross_entropy(model: Any, ids: Ids, context_length: int, batch_sequences: int = 16) -> float:
    """Mean negative log-likelihood of the targets under `model`, in nats a token."""
    ids_NT = torch.from_numpy(sequences(ids, context_length))
    total = 0.0
    for start in range(0, len(ids_NT), batch_sequences):
        ids_BT = ids_NT[start : start + batch_sequences]
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / ids_NT[:, 1:].numel()


def unigram_cross_entropy(train_ids: Ids, ids: Ids, context_length: int, vocab_size: int) -> float:
    """Mean negative log-likelihood of the targets under their frequencies in `train_ids`.

    One is added to each count.
    """
    counts = np.bincount(train_ids, minlength=vocab_size) + 1.0
    nats = -np.log(counts / counts.sum())
    return float(nats[sequences(ids, context_length)[:, 1:]].mean())
