"""Cost of reconstructions to the transformer: cross-entropy, KL and agreement, layers spliced.

Shapes: B sequences, T = context length, V = vocabulary, D = d_model, N counted tokens, L layers,
G groups of sequences. Metrics are means over counted tokens; sums are float64 over the whole set,
divided once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsae.analyze.measure.bootstrap import count_groups, group_of, group_weights
from mlsae.analyze.measure.model.sequences import Sequences, read_sequences
from mlsae.analyze.measure.rows.sums import Float, Ratio
from mlsae.analyze.pairing import Pairing
from mlsae.analyze.selection import Int
from mlsae.models import Transformer
from mlsae.models.splice import run, spliced, spliced_layers
from mlsae.sae import SAE

State = dict[str, npt.NDArray[Any]]
"""Sums over the first sequences, from which the rest can be added."""

SEQUENCES = "num_sequences"
"""Number of those sequences, in a `State`."""

LOGITS_BYTES = 2**27
"""Float32 logits in one forward: bounds memory, whatever the vocabulary."""

ROUNDING = 1e-6
"""Relative error of a loss whose logits are float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossEntropy:
    """Sums over counted tokens by group of sequences, float64.

    Arrays (L + 1, G) hold each layer spliced alone, then all of them at once.
    """

    counted: Float
    """Counted targets, (G,)."""

    untouched: Float
    """−log p(target) in the untouched transformer, (G,)."""

    stored: Float | None
    """−log p(target) with the layer's stored, decoded activations in place of the live ones, one
    layer at a time, (L, G); None where the store keeps only some positions, so that not every
    eligible token has stored ones."""

    added: Float
    """Increase of −log p(target) with the SAE's reconstruction in place of the live activations."""

    divergence: Float
    """KL(untouched ‖ SAE spliced) between the next-token distributions."""

    agreed: Float
    """Tokens whose likeliest next one is the same untouched and with the SAE spliced."""

    counted_spliced: Float
    """Counted targets that are predicted from a spliced token, (G,)."""

    added_spliced: Float
    """`added` over the targets of `counted_spliced`."""

    divergence_spliced: Float
    """`divergence` over them."""

    agreed_spliced: Float
    """`agreed` over them."""

    zero: Float
    """−log p(target) with zeros in place of the live activations of every token (SAEBench)."""

    zero_eligible: Float
    """−log p(target) with zeros in place of the live activations of eligible tokens."""

    mean: Float
    """−log p(target) with the mean over the store's eligible rows at the layer, at eligible
    tokens."""

    @property
    def num_tokens(self) -> int:
        """Counted targets."""
        return int(self.counted.sum())

    def num_targets(self) -> dict[str, int]:
        """Counts by column of the table `layers`."""
        return {
            "num_ce_tokens": self.num_tokens,
            "num_ce_tokens_spliced": int(self.counted_spliced.sum()),
        }

    @property
    def ce(self) -> float:
        """Cross-entropy of the untouched transformer, nats per counted token."""
        return float(self.untouched.sum() / self.num_tokens)

    @property
    def ce_store(self) -> Float | None:
        """(L,), with stored activations."""
        return None if self.stored is None else self.stored.sum(axis=1) / self.num_tokens

    @property
    def delta_ce(self) -> Float:
        """(L,), cross-entropy that one layer's reconstructions add."""
        return np.asarray(self.added[:-1].sum(axis=1) / self.num_tokens)

    @property
    def ce_sae(self) -> Float:
        """(L,), with one layer's reconstructions."""
        return self.ce + self.delta_ce

    @property
    def kl(self) -> Float:
        """(L,), one layer spliced against the untouched."""
        return np.asarray(self.divergence[:-1].sum(axis=1) / self.num_tokens)

    def ratios(self) -> list[dict[str, Ratio]]:
        """Every metric by column in the table `layers`, for each layer and then for all at once."""
        weights_RG = group_weights(len(self.counted))

        def total(sums_G: Float) -> Float:
            return weights_RG @ sums_G

        num_tokens, from_spliced = total(self.counted), total(self.counted_spliced)
        found = []
        for i, added in enumerate(self.added):
            sums = {
                "ce": self.untouched,
                "ce_sae": self.untouched + added,
                "delta_ce": added,
                "ce_zero": self.zero[i],
                "ce_zero_eligible": self.zero_eligible[i],
                "ce_mean": self.mean[i],
                "kl": self.divergence[i],
                "top1_agreement": self.agreed[i],
            }
            if self.stored is not None and i < len(self.stored):
                sums["ce_store"] = self.stored[i]
            ratios = {name: (total(of), num_tokens) for name, of in sums.items()}
            of_spliced = {
                "delta_ce_spliced": self.added_spliced[i],
                "kl_spliced": self.divergence_spliced[i],
                "top1_agreement_spliced": self.agreed_spliced[i],
            }
            ratios |= {name: (total(of), from_spliced) for name, of in of_spliced.items()}
            for name in ("zero", "zero_eligible", "mean"):
                lost = sums[f"ce_{name}"] - self.untouched
                ratios[f"loss_recovered_{name}"] = (
                    total(lost - added),
                    _unless_rounding(total(lost), total(self.untouched)),
                )
            found.append(ratios)
        return found


def _unless_rounding(difference: Float, of: Float) -> Float:
    """Differences between sums of losses, 0 where float32 logits could make them."""
    return np.where(abs(difference) > ROUNDING * of, difference, 0.0)


def next_log_probs(logits_BTV: Tensor, counted_BT: Tensor) -> Tensor:
    """Float32 log-probabilities at the counted positions, (N, V); `counted_BT` is (B, T − 1)."""
    return logits_BTV[:, :-1][counted_BT].float().log_softmax(-1)


def divergences(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p ‖ q) for each row, (N,)."""
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def losses(log_p_NV: Tensor, targets_N: Tensor) -> Tensor:
    """−log p(target) for each row, (N,) float64."""
    return -log_p_NV.gather(-1, targets_N[:, None])[:, 0].double()


def reconstruct_where(sae: SAE, eligible_BT: Tensor, layer: int) -> Callable[[Tensor], Tensor]:
    """A replacement that puts the SAE's reconstruction at eligible rows and keeps the others."""

    def replace(x_BTD: Tensor) -> Tensor:
        out = x_BTD.clone()
        out[eligible_BT] = sae(x_BTD[eligible_BT].float(), layer).to(x_BTD.dtype)
        return out

    return replace


def put_where(new: Tensor, eligible_BT: Tensor) -> Callable[[Tensor], Tensor]:
    """A replacement that puts `new`, (B, T, D) or (D,), at eligible rows and keeps the others."""

    def replace(x_BTD: Tensor) -> Tensor:
        return torch.where(eligible_BT[..., None], new.to(x_BTD), x_BTD)

    return replace


@torch.no_grad()
def measure(
    transformer: Transformer,
    pairing: Pairing,
    sequences: Int,
    *,
    batch_rows: int,
    progress: Callable[[int], object],
    begun: Mapping[str, npt.NDArray[Any]] | None = None,
    keep: Callable[[Callable[[], State]], object] = lambda _: None,
) -> CrossEntropy | None:
    """Score `sequences` with each layer spliced alone, then all; None without a counted target.

    The SAE's site is spliced at every eligible token, stored or not. Tokens that are flagged or at
    positions below the SAE's `skip_positions` are never replaced. With all layers spliced at once,
    each layer encodes the activations that then flow through it.

    Args:
        transformer: the model whose activations the store holds, on the pairing's device.
        pairing: store and SAE.
        sequences: sorted indices.
        batch_rows: the most tokens in a forward; fewer where the vocabulary is large.
        progress: told the number of tokens in each finished batch.
        begun: state that `keep` was given in an earlier run with the same arguments.
        keep: offered the state after each batch, as a function that makes it.
    """
    store, layers = pairing.store, pairing.layers
    token_bytes = 4 * transformer.vocab_size
    fit = min(batch_rows, LOGITS_BYTES // token_bytes) // store.context_length
    tally = _Tally(len(layers), sequences, transformer.device)
    means = _means(pairing, transformer.device)
    keeps_all = store.rows_per_sequence == store.context_length
    if begun is not None:
        tally.restore(begun)
    left = sequences[tally.num_sequences :]
    batches = read_sequences(store, left, pairing.skip_positions, max(1, fit), transformer.device)
    for batch in batches:
        inputs, eligible = batch.inputs, batch.eligible
        tally.start(batch, run(transformer, inputs))
        for i, layer in enumerate(layers):
            zero = torch.zeros_like(means[layer])
            new = [
                ("zero", torch.zeros_like),
                ("zero_eligible", put_where(zero, eligible)),
                ("mean", put_where(means[layer], eligible)),
            ]
            if keeps_all:
                stored = _stored(pairing, layer, batch.numbers).to(transformer.device)
                new.append(("stored", put_where(stored, eligible)))
            for name, replace in new:
                tally.loss(name, i, spliced(transformer, inputs, layer, replace, pairing.site))
            rebuild = reconstruct_where(pairing.sae, eligible, layer)
            tally.rebuilt(i, spliced(transformer, inputs, layer, rebuild, pairing.site))
        _measure_together(transformer, pairing, batch, means, tally)
        progress(inputs.tokens.numel())
        keep(tally.state)
    return tally.result(keeps_all)


def _measure_together(
    transformer: Transformer,
    pairing: Pairing,
    batch: Sequences,
    means: dict[int, Tensor],
    tally: "_Tally",
) -> None:
    """Splice all layers at once."""

    def logits(
        replace: Callable[[int, Tensor], Tensor], where_BT: Tensor = batch.eligible
    ) -> Tensor:
        return spliced_layers(
            transformer, batch.inputs, pairing.layers, where_BT, replace, pairing.site
        )

    def zeros(_layer: int, x_ND: Tensor) -> Tensor:
        return torch.zeros_like(x_ND)

    last = len(pairing.layers)
    tally.loss("zero", last, logits(zeros, torch.ones_like(batch.eligible)))
    tally.loss("zero_eligible", last, logits(zeros))
    tally.loss("mean", last, logits(lambda layer, x_ND: means[layer].to(x_ND).expand_as(x_ND)))
    tally.rebuilt(last, logits(lambda layer, x_ND: pairing.sae(x_ND.float(), layer)))


class _Tally:
    """Sums over one batch after another, by spliced layer and group of sequences."""

    def __init__(self, num_layers: int, sequences: Int, device: torch.device) -> None:
        self._sequences = sequences

        def zeros(*names: str, num: int) -> dict[str, Tensor]:
            shape = num, count_groups(len(sequences))
            return {n: torch.zeros(shape, dtype=torch.float64, device=device) for n in names}

        self._once = zeros("counted", "counted_spliced", "untouched", num=1)
        self._sums = zeros("stored", "zero", "zero_eligible", "mean", num=num_layers + 1)
        self._rebuilt = zeros("added", "divergence", "agreed", num=num_layers + 1)
        self._rebuilt_spliced = zeros(*self._rebuilt, num=num_layers + 1)
        self.num_sequences = 0
        """Sequences of the batches that were taken up."""

    def state(self) -> State:
        """All sums by name, and the number of sequences."""
        found = {name: of.cpu().numpy() for name, of in self._by_name().items()}
        return {**found, SEQUENCES: np.array(self.num_sequences)}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from a state."""
        self.num_sequences = int(state[SEQUENCES])
        for name, of in self._by_name().items():
            of.copy_(torch.from_numpy(state[name]))

    def _by_name(self) -> dict[str, Tensor]:
        spliced_alone = {f"{name}_spliced": of for name, of in self._rebuilt_spliced.items()}
        return {**self._once, **self._sums, **self._rebuilt, **spliced_alone}

    def start(self, batch: Sequences, logits_BTV: Tensor) -> None:
        """Take up a batch with the untouched transformer's logits."""
        self._counted = batch.counted
        self.num_sequences += len(batch.numbers)
        places = np.searchsorted(self._sequences, batch.numbers)
        groups = torch.from_numpy(group_of(places, len(self._sequences))).to(batch.counted.device)
        self._groups = groups[:, None].expand_as(batch.counted)[batch.counted]
        self._from_spliced = batch.eligible[:, :-1][batch.counted]
        self._targets = batch.inputs.tokens[:, 1:][batch.counted]
        self._log_p = next_log_probs(logits_BTV, batch.counted)
        self._losses = losses(self._log_p, self._targets)
        self._likeliest = self._log_p.argmax(-1)
        self._add(self._once["counted"][0], torch.ones_like(self._losses))
        self._add(self._once["counted_spliced"][0], self._from_spliced)
        self._add(self._once["untouched"][0], self._losses)

    def loss(self, name: str, i: int, logits_BTV: Tensor) -> None:
        """Add up −log p(target)."""
        of_N = losses(next_log_probs(logits_BTV, self._counted), self._targets)
        self._add(self._sums[name][i], of_N)

    def rebuilt(self, i: int, logits_BTV: Tensor) -> None:
        """Add up the logits with reconstructions."""
        log_q = next_log_probs(logits_BTV, self._counted)
        found = {
            "added": losses(log_q, self._targets) - self._losses,
            "divergence": divergences(self._log_p, log_q),
            "agreed": log_q.argmax(-1) == self._likeliest,
        }
        for name, of_N in found.items():
            self._add(self._rebuilt[name][i], of_N)
            self._add(self._rebuilt_spliced[name][i], of_N * self._from_spliced)

    def result(self, keeps_all: bool) -> CrossEntropy | None:
        """All sums, or None without a counted target."""
        sums = {name: of.cpu().numpy() for name, of in (self._sums | self._rebuilt).items()}
        sums |= {f"{name}_spliced": of.cpu().numpy() for name, of in self._rebuilt_spliced.items()}
        once = {name: of[0].cpu().numpy() for name, of in self._once.items()}
        stored = sums.pop("stored")
        if once["counted"].sum() == 0:
            return None
        return CrossEntropy(stored=stored[:-1] if keeps_all else None, **once, **sums)

    def _add(self, sums_G: Tensor, of_N: Tensor) -> None:
        sums_G.index_add_(0, self._groups, of_N.double())


def _means(pairing: Pairing, device: torch.device) -> dict[int, Tensor]:
    """Mean over each layer's eligible rows in the whole store, (D,) float32."""
    moments = pairing.store.moments(pairing.site, pairing.skip_positions)
    means = torch.from_numpy(moments.mean).float().to(device)
    return {layer: means[moments.layers.index(layer)] for layer in pairing.layers}


def _stored(pairing: Pairing, layer: int, sequences: Int) -> Tensor:
    """Stored activations in the sequences, decoded: (B, T, D); the store has every position."""
    store, length = pairing.store, pairing.store.context_length
    spans = [(start, start + length) for start in (sequences * length).tolist()]
    return torch.from_numpy(np.stack([store.read(pairing.site, layer, *span) for span in spans]))
