"""Numbers of the page on analyses: how they are written, and computed from others."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.analysis_figures import LOOKS, adjacent_cosine, bins, of_init

Sae = dict[str, Any]


def spread(values: Sequence[float | None], form: str = ".3f") -> str:
    """Mean, lowest and highest; – where one is not defined."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    low, middle, high = (
        format(value, form).removeprefix("-" if format(value, form).strip("-0.%") == "" else "")
        for value in (min(known), mean(known), max(known))
    )
    return middle if low == high else f"{middle} ({low}–{high})".replace("–-", " to -")


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def by_variant(study: dict[str, Any], of: Callable[[Sae], Any]) -> dict[str, list[Any]]:
    """Variant → a number of each of its SAEs."""
    return {init: [of(sae) for sae in of_init(study, init)] for init in LOOKS}


def at_layers(sae: Sae, column: str) -> list[float]:
    """A column of the table by layer."""
    return [of[column] for of in sae["layers"]]


def over_layers(column: str) -> Callable[[Sae], float | None]:
    """Mean of a column over layers; None where a layer has none."""

    def of(sae: Sae) -> float | None:
        values = at_layers(sae, column)
        return None if None in values else mean(values)

    return of


def ratio(kind: str, name: str = "single_over_aggregate") -> Callable[[Sae], float]:
    """A term or ratio of the variance of the layer."""

    def of(sae: Sae) -> float:
        value: float = sae["layer_variance"][kind][name]
        return value

    return of


def at_one_layer(sae: Sae) -> float:
    """Share of the active pairs (token, latent) that are active at one layer alone."""
    counts = sae["pairs_by_layers"]
    return float(counts[0] / sum(counts))


def at_all_layers(sae: Sae) -> float:
    """Share of the living latents that are active at every layer for some row."""
    counts = sae["num_layers_histogram"]
    return float(counts[-1] / sum(counts))


def expected(run: dict[str, Any], kind: str) -> tuple[float, float, float]:
    """Latents shared by two layers of a token, and by pairs of another kind as alike.

    Args:
        run: an entry of `similarity`.
        kind: `one_layer` or `neither`.

    Returns:
        Share of active latents that two layers of a token share; what pairs of `kind` share in
        bins of the same cosine, each weighing as many pairs as there are of two layers of a token;
        and the share of these that lie in bins where there are enough of both.
    """
    ours = {at: (share, pairs) for at, share, pairs in bins(run["one_token"], run["edges"])}
    theirs = {at: share for at, share, _ in bins(run[kind], run["edges"])}
    common = sorted(ours.keys() & theirs.keys())
    weights = [ours[at][1] for at in common]
    actual = float(np.average([ours[at][0] for at in common], weights=weights))
    other = float(np.average([theirs[at] for at in common], weights=weights))
    return actual, other, sum(weights) / sum(run["one_token"]["pairs"])


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation."""
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of ranks, of values that differ."""
    return pearson(*(list(np.argsort(np.argsort(values)).astype(float)) for values in (x, y)))


def separate(low: Sequence[float], high: Sequence[float]) -> bool:
    """True where every seed of the one lies below every seed of the other."""
    return max(low) < min(high)


def code(commands: Sequence[str]) -> str:
    """A block of commands, wrapped."""
    lines = [
        " \\\n    ".join(textwrap.wrap(line, 94, break_long_words=False, break_on_hyphens=False))
        for line in commands
    ]
    text = "\n".join(lines)
    return (
        f"<!-- not run: needs the stories260k model, its text and minutes -->\n```sh\n{text}\n```"
    )


def by_mass(study: dict[str, Any]) -> list[tuple[str, float]]:
    """Variant and its single-token over aggregate variance by mass, the lowest first."""
    means = {init: mean(seeds) for init, seeds in by_variant(study, ratio("mass")).items()}
    return sorted(means.items(), key=lambda of: of[1])


def likeness_and_variance(content: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Adjacent cosine, and single over aggregate by mass, of the variants and the demo model."""
    groups = [of_init(content["variants"], init) for init in LOOKS] + [content["demo"]["saes"]]
    return (
        [mean(map(adjacent_cosine, saes)) for saes in groups],
        [mean(map(ratio("mass"), saes)) for saes in groups],
    )


def mean_expected(
    study: dict[str, Any], init: str, kind: str = "one_layer"
) -> tuple[float, float, float]:
    """`expected` of a variant, mean over seeds."""
    runs = [expected(run, kind) for run in of_init(study, init, "similarity")]
    actual, other, covered = (mean(of) for of in zip(*runs, strict=True))
    return actual, other, covered


def middle_of(values: Iterable[int]) -> int:
    """The middle one of those that differ."""
    known = sorted(set(values))
    return int(known[len(known) // 2])
