"""What reconstructions cost the transformer: cross-entropy and KL with a layer spliced.

Shapes: B sequences, T = context length, V = vocabulary, D = d_model, N counted tokens, L layers.
All figures are nats per counted token; sums are float64 over the whole set, divided once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.analyze.pairing import Pairing
from mlsae.analyze.selection import Int
from mlsae.models import Transformer
from mlsae.models.inputs import Inputs
from mlsae.models.splice import run, spliced
from mlsae.sae import SAE
from mlsae.store import PADDING

LOGITS_BYTES = 2**27
"""Float32 logits of one forward: bounds memory, whatever the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Nats per counted token, the arrays (L,) float64."""

    num_tokens: int
    """Counted targets."""

    ce: float
    """Of the untouched transformer."""

    ce_store: npt.NDArray[np.float64]
    """With the layer's stored, decoded activations in place of the live ones."""

    ce_sae: npt.NDArray[np.float64]
    """With the SAE's reconstruction of the live activations in place of them."""

    delta_ce: npt.NDArray[np.float64]
    """ce_sae − ce, from the sums."""

    kl: npt.NDArray[np.float64]
    """KL(untouched ‖ SAE spliced) of the next-token distributions."""


def counted_targets(
    documents_BT: npt.NDArray[np.uint32], flags_BT: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Which positions' next tokens are scored: (B, T − 1).

    The next token lies in the same document and carries no flag, and the position itself is no
    padding. A separator is never a target: whether a model was taught to predict what the packing
    put there says nothing of its activations. It may be the input that a target is predicted from.
    """
    counted: npt.NDArray[np.bool_] = documents_BT[:, 1:] == documents_BT[:, :-1]
    counted &= flags_BT[:, 1:] == 0
    counted &= flags_BT[:, :-1] & PADDING == 0
    return counted


def next_log_probs(logits_BTV: Tensor, counted_BT: Tensor) -> Tensor:
    """Float32 log-probabilities at the counted positions, (N, V); `counted_BT` is (B, T − 1)."""
    return logits_BTV[:, :-1][counted_BT].float().log_softmax(-1)


def kl_sum(log_p_NV: Tensor, log_q_NV: Tensor) -> float:
    """Σ over rows of KL(p ‖ q)."""
    return float((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).double().sum())


def loss_sum(log_p_NV: Tensor, targets_N: Tensor) -> float:
    """Σ over rows of −log p(target)."""
    return float(-log_p_NV.gather(-1, targets_N[:, None]).double().sum())


def reconstruct_where(sae: SAE, eligible_BT: Tensor) -> Callable[[Tensor], Tensor]:
    """A replacement that puts the SAE's reconstruction at eligible rows and keeps the others."""

    def replace(x_BTD: Tensor) -> Tensor:
        out = x_BTD.clone()
        out[eligible_BT] = sae(x_BTD[eligible_BT].float()).to(x_BTD.dtype)
        return out

    return replace


def stored_where(x_stored_BTD: Tensor, eligible_BT: Tensor) -> Callable[[Tensor], Tensor]:
    """A replacement that puts stored activations at eligible rows and keeps the others."""

    def replace(x_BTD: Tensor) -> Tensor:
        return torch.where(eligible_BT[..., None], x_stored_BTD.to(x_BTD.dtype), x_BTD)

    return replace


@torch.no_grad()
def measure(
    transformer: Transformer,
    pairing: Pairing,
    sequences: Int,
    *,
    batch_rows: int,
    progress: Callable[[int], object],
) -> CrossEntropy | None:
    """Score `sequences` with each layer spliced alone; None if they hold no counted target.

    Rows that are flagged or at positions below the SAE's `skip_positions` are never replaced.

    Args:
        transformer: the model whose activations the store holds, on the pairing's device.
        pairing: store and SAE.
        sequences: sorted indices.
        batch_rows: the most tokens of a forward; fewer where the vocabulary is large.
        progress: told the number of tokens of each finished batch.
    """
    store, sae, layers = pairing.store, pairing.sae, pairing.layers
    num_tokens, ce = 0, 0.0
    ce_store, ce_sae, kl = (np.zeros(len(layers)) for _ in range(3))
    token_bytes = 4 * transformer.vocab_size
    fit = min(batch_rows, LOGITS_BYTES // token_bytes) // store.context_length
    for batch in _batches(pairing, sequences, max(1, fit)):
        tokens, eligible, counted = (t.to(transformer.device) for t in batch[1:])
        targets = tokens[:, 1:][counted]
        first = torch.from_numpy(batch[0].astype(np.int64))[:, None] * store.context_length
        inputs = Inputs(tokens=tokens, indices=first + torch.arange(store.context_length))
        log_p = next_log_probs(run(transformer, inputs), counted)
        num_tokens += len(targets)
        ce += loss_sum(log_p, targets)
        for i, layer in enumerate(layers):
            stored = _stored(pairing, layer, batch[0]).to(transformer.device)
            kept = spliced(transformer, inputs, layer, stored_where(stored, eligible))
            ce_store[i] += loss_sum(next_log_probs(kept, counted), targets)
            rebuilt = spliced(transformer, inputs, layer, reconstruct_where(sae, eligible))
            log_q = next_log_probs(rebuilt, counted)
            ce_sae[i] += loss_sum(log_q, targets)
            kl[i] += kl_sum(log_p, log_q)
        progress(tokens.numel())
    if num_tokens == 0:
        return None
    return CrossEntropy(
        num_tokens=num_tokens,
        ce=ce / num_tokens,
        ce_store=ce_store / num_tokens,
        ce_sae=ce_sae / num_tokens,
        delta_ce=(ce_sae - ce) / num_tokens,
        kl=kl / num_tokens,
    )


def _batches(
    pairing: Pairing, sequences: Int, batch_sequences: int
) -> Iterator[tuple[Int, Tensor, Tensor, Tensor]]:
    """Sequences, and their tokens (B, T) int64, eligible (B, T) and counted (B, T − 1) masks."""
    store, length = pairing.store, pairing.store.context_length
    for first in range(0, len(sequences), batch_sequences):
        batch = sequences[first : first + batch_sequences]
        spans = [(int(s) * length, (int(s) + 1) * length) for s in batch]
        tokens = np.stack([store.tokens(*span) for span in spans])
        documents = np.stack([store.documents(*span) for span in spans])
        flags = np.stack([store.token_flags(*span) for span in spans])
        eligible = np.stack([store.eligible(pairing.skip_positions, *span) for span in spans])
        yield (
            batch,
            torch.from_numpy(tokens.astype(np.int64)),
            torch.from_numpy(eligible),
            torch.from_numpy(counted_targets(documents, flags)),
        )


def _stored(pairing: Pairing, layer: int, sequences: Int) -> Tensor:
    store, length = pairing.store, pairing.store.context_length
    spans = [(int(s) * length, (int(s) + 1) * length) for s in sequences]
    return torch.from_numpy(
        np.stack([store.decode(store.read(pairing.site, layer, *span)) for span in spans])
    )
