"""The sections of docs/evidence/analysis.md on where latents are active, and on single ones."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.analysis_figures import (
    LOOKS,
    of_init,
)
from benchmarks.analysis_numbers import (
    at_all_layers,
    at_one_layer,
    by_variant,
    spread,
)
from benchmarks.markdown import paragraph, table


def layers_section(study: dict[str, Any]) -> str:
    """At how many layers a latent is active, heat maps, table."""
    head = [
        "variant", "layers of a pair", "pairs at one layer", "pairs at all",
        "latents at all layers", "effective layers", "layer std", "> 90% at one layer", "MMCS",
        "as published",
    ]  # fmt: skip
    rows = [
        [f"`{init}`", *layer_cells(of_init(study, init))]
        for init in LOOKS
    ]  # fmt: skip
    about = paragraph(
        "`layers of a pair`: mean number of layers at which a latent is active for a token, where "
        "it is active for it at any (`layers_of_a_pair` of `summary.json`; the shares beside it "
        "are from `events`). `latents at all layers`: living latents whose `num_layers` is "
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


def layer_cells(saes: Sequence[dict[str, Any]]) -> list[str]:
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
        f"model's; in `{fewest}` {everywhere[fewest]:.0%}, in the others at least {min(rest):.1%}. "
        "The answer to the question is yes to both halves, with random weights too."
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
    groups = {
        init: [run["groups"] for run in of_init(study, init, "kinds")]
        for init in ("trained", "random")
    }

    def share(init: str, place: int) -> str:
        return spread([of[place]["latents"] for of in groups[init]], ".1%")

    def medians(init: str, place: int, name: str) -> str:
        return spread([of[place][name] for of in groups[init]], ".2f")

    return paragraph(
        f"In the trained model {share('trained', 0)} of the latents keep to about one layer (below "
        f"1.5 effective layers) and {share('trained', 1)} to two or so (1.5 to 3), in `random` "
        f"{share('random', 0)} and {share('random', 1)}. In the trained model the latter have a "
        f"median token entropy of {medians('trained', 1, 'token_entropy')} nats, and their median "
        f"mean layer is {medians('trained', 1, 'layer_mean')}; those of three layers and more have "
        f"{medians('trained', 2, 'token_entropy')} and {medians('trained', 2, 'layer_mean')}. "
        "The largest cosine of these with a token embedding is "
        f"{medians('trained', 1, 'embedding_cosine')} and "
        f"{medians('trained', 2, 'embedding_cosine')}."
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
        f"Latent {first['latent']:,} has {max(first['prob']):.0%} of its total at one layer; "
        f"latent {last['latent']:,} is spread over {last['effective_layers']:.2f} effective layers "
        f"of {len(layers)}, at {last['layers_of_a_pair']:.2f} of them for a token. `single / "
        "aggregate` of one latent is `layer_var_token` over `layer_var`: near 1, it is spread at "
        "each token, near 0, each token has its layer."
    )
    return f"## Some latents\n\n{about}\n\n{table(head, rows)}\n\n{seen}"


def _piece(piece: str) -> str:
    return piece.replace("|", "\\|").replace("`", "'")
