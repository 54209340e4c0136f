"""The sections of docs/evidence/analysis.md on the variance of the layer."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.analysis_figures import (
    LOOKS,
    by_size,
    of_init,
)
from benchmarks.analysis_numbers import (
    by_mass,
    listed,
    middle_of,
    over_layers,
    ratio,
    spread,
)
from benchmarks.markdown import paragraph, table

CLAIM = 0.01
"""Single-token over aggregate variance, two orders of magnitude: Lawson et al."""
SCHEMES = (("mass", "mass"), ("pair_uniform", "pair-uniform"), ("as_coded", "as coded"))


def variance_section(content: dict[str, Any]) -> str:
    """The three terms, and the claim."""
    study = content["variants"]
    head = [
        "", "Var(L)", "single", "tokens", "latents", "aggregate",
        *(f"single / aggregate, {name}" for _, name in SCHEMES), "aggregate / total, mass",
    ]  # fmt: skip
    groups = {f"`{init}`": of_init(study, init) for init in LOOKS}
    groups["demo model"] = content["demo"]["saes"]
    rows = [[name, *_variance_cells(saes)] for name, saes in groups.items()]
    return f"""## The decomposition of the variance of the layer

![Terms of the variance of the layer, and single-token over aggregate](analysis/decomposition.png)

{_variance_sentence(content)}

Terms in layer², by mass (`layer_variance` of `summary.json`; [layers](../layers.md) has the
formulas):

{table(head, rows)}

{_coded_sentence(study)}

{_recomputed(content)}"""


def _variance_cells(saes: Sequence[dict[str, Any]]) -> list[str]:
    terms = ("total", "single", "tokens", "latents", "aggregate")
    return [
        *(spread([ratio("mass", name)(sae) for sae in saes], ".2f") for name in terms),
        *(spread([ratio(kind)(sae) for sae in saes], ".3f") for kind, _ in SCHEMES),
        spread([ratio("mass", "aggregate_over_total")(sae) for sae in saes], ".3f"),
    ]


def _variance_sentence(content: dict[str, Any]) -> str:
    study = content["variants"]
    ordered = by_mass(study)
    trained = [ratio("mass")(sae) for sae in of_init(study, "trained")]
    shown = listed([f"`{init}` {value:.3f}" for init, value in ordered])
    smallest = min(ratio(kind)(sae) for kind, _ in SCHEMES for sae in study["saes"])
    below = [init for init, value in ordered if value < min(trained)]
    above = [init for init, value in ordered if value > max(trained)]
    return paragraph(
        "Lawson et al. ([arXiv 2409.04185](https://arxiv.org/abs/2409.04185)) find the variance of "
        "a latent's layer about two orders of magnitude greater over the data set than at a single "
        f"token, a ratio near {CLAIM}. By mass it is here, from the lowest, {shown}; the smallest "
        f"of all, whatever the definition and the seed, is {smallest:.3f}. Most of the spread is "
        "between tokens in the trained model "
        f"({1 - mean(trained):.0%} of the aggregate), as the paper says, but by far less. Random "
        f"weights lie on both sides of the trained ones: below {_names(below)}, above "
        f"{_names(above)}."
    )


def _names(inits: Sequence[str]) -> str:
    return listed([f"`{init}`" for init in inits]) if inits else "none"


def _coded_sentence(study: dict[str, Any]) -> str:
    quotients = [ratio("as_coded")(sae) / ratio("pair_uniform")(sae) for sae in study["saes"]]
    return paragraph(
        "The published code weighs every pair alike, but divides by what is near a second moment "
        "about layer 0 instead of a variance, so it gives less: "
        f"{min(quotients):.2f} to {max(quotients):.2f} of the pair-uniform ratio in these runs. A "
        "ratio by it depends on the number of layers, and on which is called 0."
    )


def _recomputed(content: dict[str, Any]) -> str:
    saes = [sae for name in ("variants", "sizes", "demo") for sae in content[name]["saes"]]
    worst = max(sae["recomputed_within"] for sae in saes)
    return paragraph(
        "The script computes the ratios by mass and pair-uniform once more, from the table "
        "`events`, by the definition of a variance: over all "
        f"{len(saes)} analyses of this page they differ from `summary.json` by "
        f"{worst:.0e} of themselves at most."
    )


def sizes_section(study: dict[str, Any]) -> str:
    """Numbers of latents, and k."""
    runs = by_size(study)
    head = [
        "latents", "k", "FVU", "layers of a pair", "effective layers", "layer std",
        *(f"single / aggregate, {name}" for _, name in SCHEMES), "dead",
    ]  # fmt: skip
    rows = [
        [
            f"{size:,}",
            str(k),
            spread([over_layers("fvu")(sae) for sae in saes], ".3f"),
            spread([sae["layer_variance"]["layers_of_a_pair"] for sae in saes], ".2f"),
            spread([sae["effective_layers"] for sae in saes], ".2f"),
            spread([sae["mean_layer_std"] for sae in saes], ".3f"),
            *(spread([ratio(kind)(sae) for sae in saes], ".3f") for kind, _ in SCHEMES),
            spread([sae["dead_fraction"] for sae in saes], ".1%"),
        ]
        for (size, k), saes in runs.items()
    ]
    num_sequences = study["saes"][0]["num_sequences"]
    about = paragraph(
        "On the trained transformer, with the commands above but for `-R 4,16,64` or `-k 4,64`, "
        f"1 million rows of training, two seeds, and {num_sequences} of the held-out sequences."
    )
    return f"""## Other numbers of latents, and of active ones

{about}

![Single-token over aggregate, and layers of a pair, by number of latents and k](analysis/sizes.png)

{_sizes_sentence(runs)}

{table(head, rows)}"""


def _sizes_sentence(runs: dict[tuple[int, int], list[dict[str, Any]]]) -> str:
    k = middle_of(each for _, each in runs)
    size = middle_of(each for each, _ in runs)
    by_latents = [
        (n, mean(map(ratio("mass"), saes))) for (n, each), saes in runs.items() if each == k
    ]
    by_k = [(each, mean(map(ratio("mass"), saes))) for (n, each), saes in runs.items() if n == size]
    more = listed([f"{value:.3f} with {n:,}" for n, value in by_latents])
    active = listed([f"{value:.3f} at k {each}" for each, value in by_k])
    values = [value for _, value in by_latents]
    falls = values == sorted(values, reverse=True)
    falling = ", falling at each step: finer latents have fewer layers of a token" if falls else ""
    ks = [value for _, value in by_k]
    width = (max(ks) - min(ks)) / (max(values) - min(values))
    coded = [mean(map(ratio("as_coded"), runs[n, k])) for n, _ in by_latents]
    return paragraph(
        f"Single-token over aggregate variance by mass is {more} latents at k {k}"
        f"{falling}. With {size:,} latents it is {active}, a range {width:.1f} times that. A "
        "ratio is therefore to be compared only between SAEs of one size. As coded it falls from "
        f"{coded[0]:.3f} to {coded[-1]:.3f} with the number of latents, and may fall further where "
        f"there are more: nothing here says how near it comes to the published {CLAIM}. All SAEs "
        "were trained at one learning rate, tuned for none of them."
    )
