"""Share of the spread of latents over layers at single tokens: variances of the layer.

With L, J, T the layer, latent and token of a joint distribution,
Var(L) = E Var(L | J, T) + E_J Var_T E(L | J, T) + Var_J E(L | J) (the law of total variance,
twice). The first two terms add up to E Var(L | J), the spread of a latent over the data set.

Shapes: N tokens, K active slots a row, E activations (token, latent, layer), P active pairs (token,
latent), M = num_latents, L layers. Sums are float64.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-12
"""Relative error of differences of sums, at most."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of a token and a latent that is active for it at any layer; all (P,)."""

    tokens: Tensor
    """Index of the token in its block; int64, ascending."""

    latents: Tensor
    """Index of the latent; int64, ascending for each token."""

    totals: Tensor
    """Σ_l z, z the latent's value for the token at layer l; float64."""

    means: Tensor
    """E(L | j, t) = Σ_l l · z / Σ_l z, in layer ids."""

    variances: Tensor
    """Var(L | j, t)."""

    index_means: Tensor
    """The mean of the layer's index among the SAE's layers, 0 … L − 1, instead of its id."""

    index_variances: Tensor
    """The variance of that index."""

    num_events: int
    """Activations that the pairs are made of."""

    by_layer: Mapping[int, tuple[float, float]]
    """Layer → sums over active pairs there: Σ z, and Σ z / (the total of its pair)."""


def pairs_of(latents: Mapping[int, tuple[Tensor, Tensor]], num_latents: int) -> Pairs:
    """The active pairs of a block of tokens.

    Args:
        latents: layer → (N, K) values and (N, K) indices of the block's latents; K may differ.
        num_latents: M.
    """
    keys, values, ids = [], [], []
    for layer, (values_NK, indices_NK) in latents.items():
        token_N1 = torch.arange(len(values_NK), device=values_NK.device)[:, None]
        active = values_NK != 0
        keys.append((token_N1 * num_latents + indices_NK)[active])
        values.append(values_NK[active].double().abs())
        ids.append(torch.full_like(values[-1], layer))
    pair_P, pair_E = torch.unique(torch.cat(keys), return_inverse=True)
    z_E, l_E = torch.cat(values), torch.cat(ids)

    def summed(weights_E: Tensor) -> Tensor:
        return torch.bincount(pair_E, weights=weights_E, minlength=len(pair_P))

    def moments(numbers_E: Tensor) -> tuple[Tensor, Tensor]:
        means = summed(z_E * numbers_E) / totals
        return means, summed(z_E * (numbers_E - means[pair_E]).square()) / totals

    totals = summed(z_E)
    means, variances = index_means, index_variances = moments(l_E)
    if tuple(latents) != tuple(range(len(latents))):
        ascending = torch.tensor(sorted(latents), dtype=l_E.dtype, device=l_E.device)
        index_means, index_variances = moments(torch.searchsorted(ascending, l_E).double())
    shares = torch.split_with_sizes(z_E / totals[pair_E], [len(part) for part in values])
    return Pairs(
        tokens=pair_P // num_latents,
        latents=pair_P % num_latents,
        totals=totals,
        means=means,
        variances=variances,
        index_means=index_means,
        index_variances=index_variances,
        num_events=len(z_E),
        by_layer={
            layer: (float(z.sum()), float(share.sum()))
            for layer, z, share in zip(latents, values, shares, strict=True)
        },
    )


@dataclass(frozen=True)
class Terms:
    """The three terms of the variance of the layer, and their sum; layer²."""

    total: float
    """Var(L), from the layers alone."""

    single: float
    """E Var(L | J, T): the spread of a latent at a single token."""

    tokens: float
    """E_J Var_T E(L | J, T): how a latent's mean layer differs between tokens."""

    latents: float
    """Var_J E(L | J): how the mean layer differs between latents."""

    @property
    def aggregate(self) -> float:
        """E Var(L | J) = single + tokens: the spread of a latent over all tokens."""
        return self.single + self.tokens

    def summary(self) -> dict[str, float | None]:
        """Every term by its name, and the two ratios; None where 0 is divided by 0."""
        return {
            "total": self.total,
            "single": self.single,
            "tokens": self.tokens,
            "latents": self.latents,
            "aggregate": self.aggregate,
            "single_over_aggregate": _ratio(self.single, self.aggregate),
            "aggregate_over_total": _ratio(self.aggregate, self.total),
        }


class _Scheme:
    """Sums for one choice of P(T, J): a weight for each pair."""

    def __init__(self, layers: tuple[int, ...], num_latents: int, device: torch.device) -> None:
        # Squares are taken about the middle, so that little cancels between them.
        self._centre = sum(layers) / len(layers)
        self._least = _ROUNDING * (max(layers) - min(layers)) ** 2
        self._by_layer = dict.fromkeys(layers, 0.0)
        self.weight, self._first, self._second, self.within = torch.zeros(
            (4, num_latents), dtype=torch.float64, device=device
        )

    def add(self, pairs: Pairs, weights_P: Tensor, by_layer: Mapping[int, float]) -> None:
        from_centre = pairs.means - self._centre
        for into, terms_P in (
            (self.weight, weights_P),
            (self._first, weights_P * from_centre),
            (self._second, weights_P * from_centre.square()),
            (self.within, weights_P * pairs.variances),
        ):
            into += torch.bincount(pairs.latents, weights=terms_P, minlength=len(into))
        for layer, weight in by_layer.items():
            self._by_layer[layer] += weight

    def terms(self) -> Terms:
        seen = self.weight > 0
        weight, first = self.weight[seen], self._first[seen]
        whole = float(weight.sum())
        squares = first.square() / weight
        mean = float(first.sum()) / whole
        mass = sum(self._by_layer.values())
        middle = sum(layer * w for layer, w in self._by_layer.items()) / mass
        return Terms(
            total=self._unless_rounding(
                sum((layer - middle) ** 2 * w for layer, w in self._by_layer.items()) / mass
            ),
            single=self._unless_rounding(float(self.within.sum()) / whole),
            tokens=self._unless_rounding(float((self._second[seen] - squares).sum()) / whole),
            latents=self._unless_rounding(float(squares.sum()) / whole - mean**2),
        )

    def _unless_rounding(self, variance: float) -> float:
        """Variances that may be an error of the sums are 0, and no ratio divides by them."""
        return variance if variance > self._least else 0.0


class Decomposition:
    """Variances of the layer, added up block by block in memory that only latents need.

    Three definitions:

    - *mass*: P(t, j, l) is in proportion to the value of latent j for token t at layer l.
    - *pair-uniform*: every active pair (t, j) weighs the same, and P(l | t, j) follows the values.
    - *as coded*: the published code's (tim-lawson/mlsae, analysis/variances.py), batch by batch,
      ratios averaged over batches. Layers are counted from 0 there, so here their indices are
      taken. Pairs that are not active count as distributions of sum 0, so that its E Var(L | J) is
      near a second moment about the first layer.
    """

    def __init__(self, layers: tuple[int, ...], num_latents: int, device: torch.device) -> None:
        self._num_latents = num_latents
        self._mass = _Scheme(layers, num_latents, device)
        self._uniform = _Scheme(layers, num_latents, device)
        self._coded: list[tuple[float | None, float | None]] = []
        self.num_tokens = 0
        self.num_pairs = 0
        self.num_events = 0

    def add(self, pairs: Pairs, num_tokens: int) -> None:
        """Add a block of `num_tokens` tokens; for the definition as coded, it is a batch."""
        self.num_tokens += num_tokens
        self.num_pairs += len(pairs.totals)
        self.num_events += pairs.num_events
        if num_tokens == 0:
            return
        self._mass.add(pairs, pairs.totals, {n: of[0] for n, of in pairs.by_layer.items()})
        ones = torch.ones_like(pairs.totals)
        self._uniform.add(pairs, ones, {n: of[1] for n, of in pairs.by_layer.items()})
        self._coded.append(self._as_coded(pairs, num_tokens))

    def _as_coded(self, pairs: Pairs, num_tokens: int) -> tuple[float | None, float | None]:
        squares = pairs.index_variances + pairs.index_means.square()
        first, second = (
            torch.bincount(pairs.latents, weights=moment, minlength=self._num_latents) / num_tokens
            for moment in (pairs.index_means, squares)
        )
        aggregate = second - first.square()
        aggregate = torch.where(aggregate > _ROUNDING * second, aggregate, 0.0)
        of_latents = float(aggregate.mean())
        single = float(pairs.index_variances.sum()) / (num_tokens * self._num_latents)
        total = float(second.mean() - first.mean().square())
        return _ratio(single, of_latents), _ratio(of_latents, total)

    def terms(self) -> dict[str, Terms] | None:
        """The terms of `mass` and `pair_uniform`; None without an active pair."""
        if self.num_pairs == 0:
            return None
        return {"mass": self._mass.terms(), "pair_uniform": self._uniform.terms()}

    def token_variances(self) -> Tensor:
        """E Var(L | j, T) of each latent, (M,), by mass; NaN for one without a pair."""
        return torch.div(self._mass.within, self._mass.weight)

    def summary(self) -> dict[str, object] | None:
        """All of it by name; None without an active pair."""
        terms = self.terms()
        if terms is None:
            return None
        single, aggregate = zip(*self._coded, strict=True)
        return {
            "num_tokens": self.num_tokens,
            "num_pairs": self.num_pairs,
            "layers_of_a_pair": self.num_events / self.num_pairs,
            **{name: of.summary() for name, of in terms.items()},
            "as_coded": {
                "num_batches": len(self._coded),
                "single_over_aggregate": _mean(single),
                "aggregate_over_total": _mean(aggregate),
            },
        }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


def _mean(values: tuple[float | None, ...]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
