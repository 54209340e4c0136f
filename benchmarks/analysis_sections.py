"""The sections of docs/results/analysis.md on layers."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.analysis_figures import (
    LOOKS,
    adjacent_cosine,
    by_size,
    layer_pairs,
    of_init,
)
from benchmarks.analysis_numbers import (
    at_all_layers,
    at_layers,
    at_one_layer,
    by_variant,
    code,
    expected,
    listed,
    over_layers,
    pearson,
    ratio,
    spearman,
    spread,
)
from benchmarks.markdown import paragraph, table

CLAIM = 0.01
"""Single-token over aggregate variance, two orders of magnitude: Lawson et al."""
SCHEMES = (("mass", "mass"), ("pair_uniform", "pair-uniform"), ("as_coded", "as coded"))


def short_section(content: dict[str, Any]) -> str:
    """The answers, with their numbers."""
    study, demo = content["variants"], content["demo"]["saes"]
    trained = of_init(study, "trained")
    num_layers = len(trained[0]["layers"])
    pair = spread([ratio("mass", "single_over_aggregate")(s) for s in trained], ".0%")
    ordered = _by_mass(study)
    points = _points(content)
    shares = _expected_of(study, "trained")
    points_text = [
        f"**At one token**, a latent of the trained model is active at "
        f"{mean(s['layer_variance']['layers_of_a_pair'] for s in trained):.2f} of {num_layers} "
        f"layers on average, and at one alone in {mean(map(at_one_layer, trained)):.0%} of the "
        f"cases. **Over the data set** {mean(map(at_all_layers, trained)):.0%} of the living "
        f"latents are active at all {num_layers}; the effective number of layers is "
        f"{mean(s['effective_layers'] for s in trained):.2f}.",
        f"**The published claim**, that a latent's layer varies far more over the data set than at "
        f"one token (by about two orders of magnitude), holds here in direction and not in size: "
        f"single-token over aggregate variance is {pair} by mass, "
        f"{spread([ratio('pair_uniform')(s) for s in trained], '.0%')} with every pair alike, and "
        f"{spread([ratio('as_coded')(s) for s in trained], '.1%')} by the published code, which "
        f"understates it. On the demo model, of {len(demo[0]['layers'])} layers that are more "
        f"alike, it is {spread([ratio('mass')(s) for s in demo], '.0%')} by mass: there most of "
        "the spread is at single tokens.",
        "**It is no mark of training.** Among the random variants it is "
        f"{listed([f'{value:.0%} (`{init}`)' for init, value in ordered if init != 'trained'])} "
        "by mass.",
        "**It follows how alike the layers are.** Over the variants and the demo model its "
        f"correlation with the cosine of adjacent layers is {pearson(*points):.2f}. Two layers of "
        f"one token share {shares[0]:.0%} of their active latents; two different tokens at one "
        f"layer, as alike by cosine, {shares[1]:.0%}. So that a latent is active at several "
        "layers of a token says little more than that the residual stream is nearly the same there.",
        "**It depends on the size of the dictionary**: "
        f"{_size_ends(content['sizes'])}.",
    ]  # fmt: skip
    items = "\n".join(_item(text) for text in points_text)
    return f"## In short\n\n{items}"


def _item(text: str) -> str:
    lines = paragraph(f"- {text}").splitlines()
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])


def _by_mass(study: dict[str, Any]) -> list[tuple[str, float]]:
    means = {init: mean(seeds) for init, seeds in by_variant(study, ratio("mass")).items()}
    return sorted(means.items(), key=lambda of: of[1])


def _points(content: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Of the variants and the demo model: adjacent cosine, single over aggregate by mass."""
    groups = [of_init(content["variants"], init) for init in LOOKS] + [content["demo"]["saes"]]
    return (
        [mean(map(adjacent_cosine, saes)) for saes in groups],
        [mean(map(ratio("mass"), saes)) for saes in groups],
    )


def _expected_of(
    study: dict[str, Any], init: str, kind: str = "one_layer"
) -> tuple[float, float, float]:
    runs = [expected(run, kind) for run in of_init(study, init, "similarity")]
    actual, other, covered = (mean(of) for of in zip(*runs, strict=True))
    return actual, other, covered


def _size_ends(study: dict[str, Any]) -> str:
    runs = by_size(study)
    k = _middle(k for _, k in runs)
    sizes = [size for size, each in runs if each == k]
    ends = [mean(map(ratio("mass"), runs[size, k])) for size in (sizes[0], sizes[-1])]
    return (
        f"{ends[0]:.0%} by mass with {sizes[0]:,} latents, {ends[1]:.0%} with {sizes[-1]:,}, both "
        f"at k {k}"
    )


def _middle(values: Any) -> int:
    known = sorted(set(values))
    return int(known[len(known) // 2])


def layers_section(study: dict[str, Any]) -> str:
    """At how many layers a latent is active, heat maps, table."""
    head = [
        "variant", "layers of a pair", "pairs at one layer", "pairs at all", "latents at all layers",
        "effective layers", "layer std", "> 90% at one layer", "MMCS", "as published",
    ]  # fmt: skip
    rows = [
        [f"`{init}`", *_layer_cells(of_init(study, init))]
        for init in LOOKS
    ]  # fmt: skip
    about = paragraph(
        "`layers of a pair`: mean number of layers at which a latent is active for a token, where "
        "it is active for it at any (`layers_of_a_pair` of `summary.json`; the shares beside it "
        "are from `activations`). `latents at all layers`: living latents whose `num_layers` is "
        "all. `effective layers`: exp of `layer_entropy`, mean over living latents. `layer std`: "
        "mean of `layer_std`. `> 90% at one layer`: living latents with P(layer | latent) above "
        "0.9 somewhere (`latent_layers.parquet`). `MMCS`: mean of the largest decoder cosine with "
        "any other latent, and as the published code takes it."
    )
    return f"""## Where latents are active

![Number of layers of a latent at one token, and over the data set, by variant](analysis/layers.png)

{_layers_sentence(study)}

![P(layer | latent) of every living latent, a panel a variant and the demo model](analysis/heat.png)

{_heat_sentence(study)}

{table(head, rows)}

{about}"""


def _layer_cells(saes: Sequence[dict[str, Any]]) -> list[str]:
    return [
        spread([sae["layer_variance"]["layers_of_a_pair"] for sae in saes], ".2f"),
        spread([at_one_layer(sae) for sae in saes], ".1%"),
        spread([sae["pairs_by_layers"][-1] / sum(sae["pairs_by_layers"]) for sae in saes], ".1%"),
        spread([at_all_layers(sae) for sae in saes], ".1%"),
        spread([sae["effective_layers"] for sae in saes], ".2f"),
        spread([sae["mean_layer_std"] for sae in saes], ".3f"),
        spread([sae["one_layer_fraction"] for sae in saes], ".1%"),
        spread([sae["mmcs"] for sae in saes], ".3f"),
        spread([sae["mmcs_published"] for sae in saes], ".3f"),
    ]


def _layers_sentence(study: dict[str, Any]) -> str:
    one = {init: mean(of) for init, of in by_variant(study, at_one_layer).items()}
    everywhere = {init: mean(of) for init, of in by_variant(study, at_all_layers).items()}
    least, most = min(one, key=one.__getitem__), max(one, key=one.__getitem__)
    fewest = min(everywhere, key=everywhere.__getitem__)
    rest = [value for init, value in everywhere.items() if init != fewest]
    return paragraph(
        "At one token most latents that are active at all are so at one layer: "
        f"{one['trained']:.0%} of the pairs of the trained model, from {one[least]:.0%} "
        f"(`{least}`) to {one[most]:.0%} (`{most}`) over the variants. Over the data set nearly "
        f"all are active at every layer at least once, {everywhere['trained']:.0%} of the trained "
        f"model's; in `{fewest}` {everywhere[fewest]:.0%}, in the others at least {min(rest):.0%}. "
        "So the answer to the question is yes to both halves, and it is so with random weights too."
    )


def _heat_sentence(study: dict[str, Any]) -> str:
    alone = {
        init: mean(of) for init, of in by_variant(study, lambda s: s["one_layer_fraction"]).items()
    }
    effective = {
        init: mean(of) for init, of in by_variant(study, lambda s: s["effective_layers"]).items()
    }
    least = min(effective, key=effective.__getitem__)
    most = max(effective, key=effective.__getitem__)
    return paragraph(
        "Seed 0 of each; latents from left to right by their mean layer. Few columns are bright at "
        f"one layer alone: of the trained model {alone['trained']:.1%} of the latents have over "
        f"90% of their total at one layer, of `random` {alone['random']:.1%}. Latents are spread "
        f"widest in `{most}` ({effective[most]:.2f} effective layers) and least in `{least}` "
        f"({effective[least]:.2f})."
    )


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

{_coded_sentence(study)}"""


def _variance_cells(saes: Sequence[dict[str, Any]]) -> list[str]:
    terms = ("total", "single", "tokens", "latents", "aggregate")
    return [
        *(spread([ratio("mass", name)(sae) for sae in saes], ".2f") for name in terms),
        *(spread([ratio(kind)(sae) for sae in saes], ".3f") for kind, _ in SCHEMES),
        spread([ratio("mass", "aggregate_over_total")(sae) for sae in saes], ".3f"),
    ]


def _variance_sentence(content: dict[str, Any]) -> str:
    study = content["variants"]
    ordered = _by_mass(study)
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


def similarity_section(content: dict[str, Any]) -> str:
    """Whether likeness of the layers explains it."""
    study = content["variants"]
    head = ["variant", "adjacent cosine", "two layers, one token", "two tokens, one layer",
            "pairs covered", "two tokens, two layers", "covered"]  # fmt: skip
    rows = []
    for init in LOOKS:
        actual, same, covered = _expected_of(study, init)
        _, other, covered_other = _expected_of(study, init, "neither")
        rows.append(
            [
                f"`{init}`",
                spread([adjacent_cosine(sae) for sae in of_init(study, init)], ".3f"),
                f"{actual:.1%}",
                f"{same:.1%}",
                f"{covered:.0%}",
                f"{other:.1%}",
                f"{covered_other:.0%}",
            ]
        )
    run = study["similarity"][0]
    about = paragraph(
        "Can the likeness of adjacent layers alone make a latent active at several layers of one "
        "token? Two rows are compared by the cosine of what the encoder takes of them "
        "(standardised, less the SAE's bias) and by the active latents that they share, twice "
        "those active in both over those of the one and of the other. If two *different tokens* at "
        "one layer share as many latents at the same cosine, then that the two rows are one "
        f"token's adds nothing. {run['num_tokens']:,} held-out tokens, all pairs of them, in bins "
        "of 0.05; all seeds, the figure of seed 0."
    )
    what = paragraph(
        "What two layers of one token share, over bins that hold at least 30 pairs of either kind, "
        "and what pairs of different tokens as alike share, weighed by the cosines of the first; "
        "`covered` is the share of the first in those bins. Adjacent cosine: the store's, about "
        "the layers' means (`adjacent_cosine` of `layers.parquet`), mean over layers."
    )
    return f"""## Is it only that layers are alike?

{about}

![Active latents shared against cosine, by kind of pair, a panel a variant](analysis/similarity.png)

{_similarity_sentence(study)}

{what}

{table(head, rows)}

![Latents shared against cosine of layers; single-token share against it](analysis/confound.png)

{_confound_sentence(content)}"""


def _similarity_sentence(study: dict[str, Any]) -> str:
    gaps = []
    for init in LOOKS:
        actual, same, covered = _expected_of(study, init)
        gaps.append(f"`{init}` {actual:.0%} and {same:.0%} (bins of {covered:.0%} of the pairs)")
    return paragraph(
        "Within each variant the curves lie nearly on one another: rows share latents as they are "
        "alike, whether they are one token's at two layers or two tokens' at one. Two layers of a "
        f"token share, and two tokens at one layer as alike: {listed(gaps)}. "
        "The curves hardly differ between variants either."
    )  # fmt: skip


def _confound_sentence(content: dict[str, Any]) -> str:
    study = content["variants"]
    pairs = [of for init in LOOKS for of in layer_pairs(study, init)]
    cosine, shared = [of[0] for of in pairs], [of[1] for of in pairs]
    x, y = _points(content)
    alone = (x[:-1], y[:-1])
    return paragraph(
        f"Left, every two layers of every variant ({len(pairs)} points, mean over seeds): rank "
        f"correlation of centred cosine and share of latents {spearman(cosine, shared):.2f}. "
        "Right, single-token over aggregate variance by mass against the mean cosine of adjacent "
        f"layers: correlation {pearson(*alone):.2f} over the {len(alone[0])} variants, "
        f"{pearson(x, y):.2f} with the demo model, ranks {spearman(x, y):.2f}. With so few points "
        "this is a hint; the figure above it is the test."
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
    return f"""## Other numbers of latents, and of active ones

On the trained transformer, with the commands above but for `-R 4,64` or `-k 4,64`.

![Single-token over aggregate, and layers of a pair, by number of latents and k](analysis/sizes.png)

{_sizes_sentence(runs)}

{table(head, rows)}"""


def _sizes_sentence(runs: dict[tuple[int, int], list[dict[str, Any]]]) -> str:
    k = _middle(each for _, each in runs)
    size = _middle(each for each, _ in runs)
    by_latents = [
        (n, mean(map(ratio("mass"), saes))) for (n, each), saes in runs.items() if each == k
    ]
    by_k = [(each, mean(map(ratio("mass"), saes))) for (n, each), saes in runs.items() if n == size]
    more = listed([f"{value:.3f} with {n:,}" for n, value in by_latents])
    active = listed([f"{value:.3f} at k {each}" for each, value in by_k])
    values = [value for _, value in by_latents]
    falls = values == sorted(values, reverse=True)
    ks = [value for _, value in by_k]
    width = (max(ks) - min(ks)) / (max(values) - min(values))
    return paragraph(
        f"Single-token over aggregate variance by mass is {more} latents at k {k}"
        f"{', falling at each step: finer latents are active at fewer layers of a token' if falls else ''}"
        f". With {size:,} latents it is {active}, a range {width:.1f} times that. A ratio is "
        "therefore to be compared only between SAEs of one size."
    )


def kinds_section(study: dict[str, Any]) -> str:
    """Latents of one layer against latents of many."""
    rows = []
    for init in LOOKS:
        runs = of_init(study, init, "kinds")
        for place in range(len(runs[0]["groups"])):
            groups = [run["groups"][place] for run in runs]
            rows.append([f"`{init}`", _kind(groups[0]), *_kind_cells(groups)])
    head = [
        "variant", "effective layers", "latents", "of the total", "density", "mean value",
        "mean layer", "token entropy", "embedding cosine",
    ]  # fmt: skip
    return f"""## Latents of one layer, latents of many

Living latents by their effective number of layers, exp(`layer_entropy`); share of them, share of
the total of all values, and medians of columns of `latents.parquet`.

{table(head, rows)}

{_kinds_sentence(study)}"""


def _kind(group: dict[str, Any]) -> str:
    if group["high"] is None:
        return f"from {group['low']:g}"
    return (
        f"below {group['high']:g}"
        if group["low"] == 0
        else f"{group['low']:g} to {group['high']:g}"
    )


def _kind_cells(groups: Sequence[dict[str, Any]]) -> list[str]:
    forms = (
        ("latents", ".1%"), ("total", ".1%"), ("density", ".2%"), ("mean", ".2f"),
        ("layer_mean", ".2f"), ("token_entropy", ".2f"), ("embedding_cosine", ".2f"),
    )  # fmt: skip
    return [spread([group[name] for group in groups], form) for name, form in forms]


def _kinds_sentence(study: dict[str, Any]) -> str:
    groups = [run["groups"] for run in of_init(study, "trained", "kinds")]
    few, many = ([of[place] for of in groups] for place in (0, 2))
    random = [run["groups"][0]["latents"] for run in of_init(study, "random", "kinds")]

    def median(of: Sequence[dict[str, Any]], name: str) -> str:
        return spread([group[name] for group in of], ".2f")

    return paragraph(
        f"In the trained model {mean(of['latents'] for of in few):.1%} of the latents keep to about "
        f"one layer (below 1.5), in `random` {mean(random):.1%}. Against those of three layers and "
        f"more, they have a median token entropy of {median(few, 'token_entropy')} against "
        f"{median(many, 'token_entropy')} nats and a largest cosine with a token embedding of "
        f"{median(few, 'embedding_cosine')} against {median(many, 'embedding_cosine')}."
    )


def latents_section(study: dict[str, Any]) -> str:
    """A few latents of the trained model."""
    layers = [of["layer"] for of in study["saes"][0]["layers"]]
    shown = study["latents"]
    head = [
        "latent", "quantile", "active", *(f"P({layer})" for layer in layers), "effective layers",
        "layers at a token", "single / aggregate", "entropy", "tokens, share of its total",
    ]  # fmt: skip
    rows = [
        [
            f"{of['latent']:,}",
            f"{of['quantile']:.0%}",
            f"{of['count']:,}",
            *(f"{p:.0%}" for p in of["prob"]),
            f"{of['effective_layers']:.2f}",
            f"{of['layers_of_a_pair']:.2f}",
            f"{of['layer_var_token'] / of['layer_var']:.2f}" if of["layer_var"] else "–",
            f"{of['token_entropy']:.2f}",
            ", ".join(f"`{_piece(t['piece'])}` {t['share']:.0%}" for t in of["tokens"]),
        ]
        for of in shown
    ]
    first, last = shown[0], shown[-1]
    about = paragraph(
        "Seed 0 of the trained model. The rule: of latents with at least 500 activations, sorted "
        "by effective number of layers, those at 0, 25, 50, 75 and 100%. `active` counts rows over "
        "all layers; P(l) is the share of its total at layer l; `layers at a token` is over tokens "
        "that it is active for; `▁` is a space before the piece."
    )
    seen = paragraph(
        f"Latent {first['latent']:,} has {max(first['prob']):.0%} of its total at one layer; latent "
        f"{last['latent']:,} is spread over {last['effective_layers']:.2f} effective layers of "
        f"{len(layers)}, at {last['layers_of_a_pair']:.2f} of them for a token. `single / "
        "aggregate` of one latent is `layer_var_token` over `layer_var`: near 1, it is spread at "
        "each token, near 0, each token has its layer."
    )
    return f"## Some latents\n\n{about}\n\n{table(head, rows)}\n\n{seen}"


def _piece(piece: str) -> str:
    return piece.replace("|", "\\|").replace("`", "'")


def demo_section(study: dict[str, Any]) -> str:
    """The demo model, by layer and as a whole."""
    saes, store = study["saes"], study["store"]
    about = paragraph(
        f"The transformer that comes with the package ({len(store['layers'])} layers, d_model "
        f"{store['d_model']}, trained on Python's standard library) with the settings of `mlsae "
        f"demo` and {len(saes)} seeds instead of one: {store['num_tokens']:,} tokens, "
        f"{saes[0]['num_latents']:,} latents, k {saes[0]['k']}; over {saes[0]['num_sequences']} "
        "held-out sequences. `mlsae demo` draws the figures of one of these SAEs."
    )
    commands = [study["commands"][0], study["commands"][1], study["commands"][2]]
    columns = (
        ("cosine", ".3f"), ("fvu", ".3f"), ("l0", ".2f"), ("l1", ".2f"), ("dead_fraction", ".1%"),
        ("delta_ce", ".3f"), ("loss_recovered_zero", ".3f"), ("loss_recovered_mean", ".3f"),
        ("token_entropy", ".2f"), ("adjacent_cosine", ".3f"),
    )  # fmt: skip
    head = ["layer", "cosine", "FVU", "L0", "L1", "not active", "delta CE", "recovered, zero",
            "recovered, mean", "token entropy", "adjacent cosine"]  # fmt: skip
    rows = [
        [
            str(of["layer"]),
            *(
                spread([at_layers(sae, name)[place] for sae in saes], form)
                for name, form in columns
            ),
        ]
        for place, of in enumerate(saes[0]["layers"])
    ]
    whole = table(
        ["layers of a pair", "pairs at one layer", "pairs at all", "latents at all layers",
         "effective layers", "layer std", "> 90% at one layer", "MMCS", "as published"],
        [_layer_cells(saes)],
    )  # fmt: skip
    return f"""## The demo model

{about}

{code(commands)}

{_demo_sentence(saes)}

{table(head, rows)}

{whole}"""


def _demo_sentence(saes: Sequence[dict[str, Any]]) -> str:
    single = spread([ratio("mass")(sae) for sae in saes], ".2f")
    uniform = spread([ratio("pair_uniform")(sae) for sae in saes], ".2f")
    coded = spread([ratio("as_coded")(sae) for sae in saes], ".2f")
    return paragraph(
        f"Its layers are alike (adjacent cosine {mean(map(adjacent_cosine, saes)):.3f} on average), "
        f"and a latent that is active for a token is so at "
        f"{mean(sae['layer_variance']['layers_of_a_pair'] for sae in saes):.2f} of "
        f"{len(saes[0]['layers'])} layers, at one alone in "
        f"{mean(map(at_one_layer, saes)):.0%} of the cases. Single-token over aggregate variance is "
        f"{single} by mass, {uniform} pair-uniform, {coded} as coded: most of the spread of a "
        "latent over layers is at single tokens, the reverse of the published claim."
    )
