"""What reconstructions cost the transformer: cross-entropy and KL with a layer spliced.

Shapes: B sequences, T = context length, V = vocabulary, D = d_model, N counted tokens, L layers.
All figures are nats per counted token; sums are float64 over the whole set, divided once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.analyze.pairing import Pairing
from mlsae.analyze.selection import Int
from mlsae.analyze.sequences import read_sequences
from mlsae.models import Transformer
from mlsae.models.splice import run, spliced
from mlsae.sae import SAE

LOGITS_BYTES = 2**27
"""Float32 logits of one forward: bounds memory, whatever the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Nats per counted token, the arrays (L,) float64."""

    num_tokens: int
    """Counted targets."""

    ce: float
    """Of the untouched transformer."""

    ce_store: npt.NDArray[np.float64] | None
    """With the layer's stored, decoded activations in place of the live ones; None where the store
    keeps only some positions, so that not every eligible token has stored ones."""

    ce_sae: npt.NDArray[np.float64]
    """With the SAE's reconstruction of the live activations in place of them."""

    delta_ce: npt.NDArray[np.float64]
    """ce_sae − ce, from the sums."""

    kl: npt.NDArray[np.float64]
    """KL(untouched ‖ SAE spliced) of the next-token distributions."""


def next_log_probs(logits_BTV: Tensor, counted_BT: Tensor) -> Tensor:
    """Float32 log-probabilities at the counted positions, (N, V); `counted_BT` is (B, T − 1)."""
    return logits_BTV[:, :-1][counted_BT].float().log_softmax(-1)


def kl_sum(log_p_NV: Tensor, log_q_NV: Tensor) -> float:
    """Σ over rows of KL(p ‖ q)."""
    return float((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).double().sum())


def loss_sum(log_p_NV: Tensor, targets_N: Tensor) -> float:
    """Σ over rows of −log p(target)."""
    return float(-log_p_NV.gather(-1, targets_N[:, None]).double().sum())


def reconstruct_where(sae: SAE, eligible_BT: Tensor, layer: int) -> Callable[[Tensor], Tensor]:
    """A replacement that puts the SAE's reconstruction at eligible rows and keeps the others."""

    def replace(x_BTD: Tensor) -> Tensor:
        out = x_BTD.clone()
        out[eligible_BT] = sae(x_BTD[eligible_BT].float(), layer).to(x_BTD.dtype)
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

    The SAE's site is spliced at every eligible token, stored or not. Tokens that are flagged or at
    positions below the SAE's `skip_positions` are never replaced.

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
    keeps_all = store.rows_per_sequence == store.context_length
    batches = read_sequences(
        store, sequences, pairing.skip_positions, max(1, fit), transformer.device
    )
    for batch in batches:
        inputs, eligible, counted = batch.inputs, batch.eligible, batch.counted
        targets = inputs.tokens[:, 1:][counted]
        log_p = next_log_probs(run(transformer, inputs), counted)
        num_tokens += len(targets)
        ce += loss_sum(log_p, targets)
        for i, layer in enumerate(layers):
            if keeps_all:
                stored = _stored(pairing, layer, batch.numbers).to(transformer.device)
                put_stored = stored_where(stored, eligible)
                kept = spliced(transformer, inputs, layer, put_stored, pairing.site)
                ce_store[i] += loss_sum(next_log_probs(kept, counted), targets)
            put_rebuilt = reconstruct_where(sae, eligible, layer)
            rebuilt = spliced(transformer, inputs, layer, put_rebuilt, pairing.site)
            log_q = next_log_probs(rebuilt, counted)
            ce_sae[i] += loss_sum(log_q, targets)
            kl[i] += kl_sum(log_p, log_q)
        progress(inputs.tokens.numel())
    if num_tokens == 0:
        return None
    return CrossEntropy(
        num_tokens=num_tokens,
        ce=ce / num_tokens,
        ce_store=ce_store / num_tokens if keeps_all else None,
        ce_sae=ce_sae / num_tokens,
        delta_ce=(ce_sae - ce) / num_tokens,
        kl=kl / num_tokens,
    )


def _stored(pairing: Pairing, layer: int, sequences: Int) -> Tensor:
    """What a store of every position holds of the sequences, decoded: (B, T, D)."""
    store, length = pairing.store, pairing.store.context_length
    spans = [(start, start + length) for start in (sequences * length).tolist()]
    return torch.from_numpy(np.stack([store.read(pairing.site, layer, *span) for span in spans]))
