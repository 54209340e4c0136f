"""The sections of docs/evidence/analysis.md on metrics, and on the claims of Heap et al."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.analysis_figures import LOOKS, of_init
from benchmarks.analysis_numbers import (
    at_layers,
    by_variant,
    listed,
    over_layers,
    separate,
    spread,
)
from benchmarks.markdown import paragraph, table

METRICS = (
    ("cosine", ".3f", "Cosine of x and x̂, mean over rows (`cosine`)"),
    ("fvu", ".3f", "Fraction of variance unexplained (`fvu`); explained variance is 1 − FVU"),
    ("l0", ".2f", "L0, active latents a row (`l0`)"),
    ("l1", ".2f", "L1, sum of latent values a row (`l1`)"),
    ("dead_fraction", ".1%", "Latents active at none of the layer's rows (`dead_fraction`)"),
    ("delta_ce", ".3f", "Delta CE, nats a token, one layer spliced (`delta_ce`)"),
    (
        "loss_recovered_zero_eligible",
        ".3f",
        "Loss recovered against zeros at eligible tokens (`loss_recovered_zero_eligible`)",
    ),
    (
        "loss_recovered_mean",
        ".3f",
        "Loss recovered against mean ablation (`loss_recovered_mean`)",
    ),
    ("token_entropy", ".2f", "Token entropy, nats, all activations of a latent at the layer"),
    ("token_entropy_strongest", ".2f", "Token entropy, nats, its 40 strongest there"),
)


def metrics_section(study: dict[str, Any]) -> str:
    """By variant, and by variant and layer."""
    layers = [of["layer"] for of in study["saes"][0]["layers"]]
    head = [
        "variant", "CE", "cosine", "FVU", "explained", "L0", "L1", "dead", "delta CE",
        "all spliced", "token entropy",
    ]  # fmt: skip
    rows = []
    for init in LOOKS:
        saes = of_init(study, init)
        rows.append(
            [
                f"`{init}`",
                spread([at_layers(sae, "ce")[0] for sae in saes], ".2f"),
                *(
                    spread([over_layers(name)(sae) for sae in saes], form)
                    for name, form in (
                        ("cosine", ".3f"),
                        ("fvu", ".3f"),
                        ("explained_variance", ".3f"),
                        ("l0", ".2f"),
                        ("l1", ".2f"),
                    )
                ),
                spread([sae["dead_fraction"] for sae in saes], ".1%"),
                spread([over_layers("delta_ce")(sae) for sae in saes], ".3f"),
                spread([sae["all_layers"]["delta_ce"] for sae in saes], ".3f"),
                spread([sae["token_entropy"] for sae in saes], ".2f"),
            ]
        )
    tables = "\n\n".join(
        f"{title}:\n\n{table(['variant', *map(str, layers)], _by_layer(study, name, form))}"
        for name, form, title in METRICS
    )
    about = paragraph(
        "Means over layers of the columns of `layers.parquet`; `CE` is the untouched transformer's "
        "cross-entropy, `dead` the share of latents active at none of the rows of any layer, "
        "`all spliced` delta CE with every layer replaced at once (`overall.parquet`, `all`), and "
        "`token entropy` the mean over latents of `token_entropy` of `latents.parquet`, all layers "
        "together."
    )
    return f"""## Metrics by variant and layer

![Six metrics by layer, a line a variant](analysis/metrics.png)

{_metrics_sentence(study)}

{about}

{table(head, rows)}

{_caution(study)}

### By layer

{_entropy_text(study)}

{tables}"""


def _by_layer(study: dict[str, Any], name: str, form: str) -> list[list[str]]:
    found = []
    for init in LOOKS:
        columns = zip(*(at_layers(sae, name) for sae in of_init(study, init)), strict=True)
        found.append([f"`{init}`", *(spread(list(column), form) for column in columns)])
    return found


def _metrics_sentence(study: dict[str, Any]) -> str:
    fvu = {init: mean(seeds) for init, seeds in by_variant(study, over_layers("fvu")).items()}
    order = sorted(fvu, key=lambda init: fvu[init])
    widest = max(
        (max(seeds) - min(seeds)) / mean(seeds)
        for seeds in by_variant(study, over_layers("fvu")).values()
    )
    shown = listed([f"`{init}` {fvu[init]:.3f}" for init in order])
    return paragraph(
        f"A line is the mean over seeds, the band around it, mostly hidden by it, reaches from the "
        f"lowest to the highest. Mean FVU over layers from best to worst: {shown}. Seeds of one "
        f"variant lie within {widest:.1%} of each other in it, so they tell the variants apart."
    )


def _caution(study: dict[str, Any]) -> str:
    random = [init for init in LOOKS if init != "trained"]
    ce = {init: at_layers(of_init(study, init)[0], "ce")[0] for init in LOOKS}
    recovered = [
        value
        for init in random
        for sae in of_init(study, init)
        for name in ("loss_recovered_zero_eligible", "loss_recovered_mean")
        for value in at_layers(sae, name)
        if value is not None
    ]
    delta = [
        value
        for init in random
        for sae in of_init(study, init)
        for value in at_layers(sae, "delta_ce")
    ]
    below = sum(value < 0 for value in delta) / len(delta)
    others = listed([f"`{init}` {ce[init]:.2f}" for init in random])
    trained = of_init(study, "trained")
    zero = mean(over_layers("loss_recovered_zero_eligible")(sae) or 0.0 for sae in trained)
    by_mean = mean(over_layers("loss_recovered_mean")(sae) or 0.0 for sae in trained)
    return paragraph(
        "**Cross-entropy says something of the trained model alone.** It has a CE of "
        f"{ce['trained']:.2f} nats; the others predict nothing ({others}), so that what a "
        f"reconstruction changes says little: delta CE is below 0 in {below:.0%} of their layers "
        f"and seeds, loss recovered goes from {min(recovered):.1f} to {max(recovered):.1f}. For "
        f"the trained model loss recovered is {zero:.3f} against zeros at eligible tokens and "
        f"{by_mean:.3f} against mean ablation, mean over layers; of these the second is the "
        "fairer. In the tables it is – where an ablation costs nothing for a seed, so that it is "
        "not defined."
    )


def _entropy_text(study: dict[str, Any]) -> str:
    fewest = min(at for sae in study["saes"] for at in at_layers(sae, "num_latents_with_entropy"))
    return paragraph(
        "Token entropy by layer is taken from the table `events`: −Σ p ln p over token ids, p "
        "the share of an id in the latent's values at that layer; mean over latents with at least "
        f"40 activations there (at least {fewest:,} of them). Over all its activations a latent "
        "that is often active can have more ids; over its 40 strongest, all have an equal number "
        "of them, which is nearer to Heap et al., who take a latent's strongest examples."
    )


def heap_section(study: dict[str, Any], vocabulary: int) -> str:
    """The claims of Heap et al. point by point."""
    rows = [
        _control_worse(study),
        _control_by_depth(study),
        _random_by_l1(study),
        _rising(study),
        _randomised_low(study),
        _control_high(study),
        _entropy_random(study),
        _loss_recovered(study),
        ["Scores of automated explanations overlap with trained ones", "not measured", "–"],
    ]
    about = paragraph(
        "Heap et al. ([arXiv 2501.17727](https://arxiv.org/abs/2501.17727)) train an SAE for each "
        "layer of Pythia models, trained and randomised in these ways. The re-randomised ones "
        "are `rerandomized` and `rerandomized-keep-embeddings` here, their step 0 is nearest to "
        "`random`, the control is `control`. Here one SAE is for all layers, the model is tiny, "
        "and their main result, scores of automated explanations, is not measured. Token entropies "
        f"are of the 40 strongest, first to last layer, over a vocabulary of {vocabulary:,} pieces "
        "where theirs has some 50,000, so only how they compare means something. `yes` needs every "
        "seed and part of the claim to agree, `in part` some."
    )
    head = ["claim", "here", "same direction"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- | --- |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return f"## The claims of Heap et al., point by point\n\n{about}\n\n" + "\n".join(lines)


def _verdict(holds: Sequence[bool]) -> str:
    return "yes" if all(holds) else "no" if not any(holds) else "in part"


def _control_worse(study: dict[str, Any]) -> list[str]:
    cosine = by_variant(study, over_layers("cosine"))
    explained = by_variant(study, over_layers("explained_variance"))
    holds = [
        separate(of["control"], of[other])
        for of in (cosine, explained)
        for other in ("trained", "rerandomized", "rerandomized-keep-embeddings", "random")
    ]
    here = (
        f"cosine {_pair(cosine, 'control', 'trained', '.3f')}, explained variance "
        f"{_pair(explained, 'control', 'trained', '.3f')} (re-randomised: "
        f"{mean(cosine['rerandomized']):.3f} and {mean(explained['rerandomized']):.3f})"
    )
    return ["The control has far lower cosine and explained variance", here, _verdict(holds)]


def _pair(values: dict[str, list[float]], first: str, second: str, form: str) -> str:
    a, b = format(mean(values[first]), form), format(mean(values[second]), form)
    return f"{a} against {b} of `{second}`"


def _control_by_depth(study: dict[str, Any]) -> list[str]:
    fvu = [at_layers(sae, "fvu") for sae in of_init(study, "control")]
    cosine = [at_layers(sae, "cosine") for sae in of_init(study, "control")]
    holds = [
        *(run[-1] > run[0] for run in fvu),
        *(run[-1] < run[0] for run in cosine),
    ]
    here = (
        f"first to last layer, FVU {_ends(fvu, '.3f')}, cosine {_ends(cosine, '.3f')} "
        f"(trained: FVU {_ends([at_layers(s, 'fvu') for s in of_init(study, 'trained')], '.3f')})"
    )
    return ["The control's error rises with depth", here, _verdict(holds)]


def _ends(runs: Sequence[Sequence[float]], form: str) -> str:
    return f"{mean(run[0] for run in runs):{form}} to {mean(run[-1] for run in runs):{form}}"


def _random_by_l1(study: dict[str, Any]) -> list[str]:
    differences = {}
    for name in ("cosine", "explained_variance", "l1"):
        runs = by_variant(study, over_layers(name))
        differences[name] = mean(runs["random"]) / mean(runs["trained"]) - 1
    fvu = by_variant(study, over_layers("fvu"))
    differences["fvu"] = mean(fvu["random"]) / mean(fvu["trained"]) - 1
    holds = [
        abs(differences["l1"]) > abs(differences[name])
        for name in ("cosine", "explained_variance", "fvu")
    ]
    here = (
        f"`random` over `trained`: L1 {differences['l1']:+.1%}, cosine "
        f"{differences['cosine']:+.1%}, explained variance "
        f"{differences['explained_variance']:+.1%}, but FVU {differences['fvu']:+.1%}"
    )
    return ["Step 0 differs from trained mainly in L1", here, _verdict(holds)]


def _entropies(study: dict[str, Any], init: str) -> list[list[float]]:
    return [at_layers(sae, "token_entropy_strongest") for sae in of_init(study, init)]


def _rising(study: dict[str, Any]) -> list[str]:
    runs = _entropies(study, "trained")
    here = f"{_ends(runs, '.2f')} nats, first to last layer (40 strongest)"
    holds = [run == sorted(run) for run in runs]
    return ["Token entropy of trained rises with depth", here, _verdict(holds)]


def _randomised_low(study: dict[str, Any]) -> list[str]:
    trained = [mean(run) for run in _entropies(study, "trained")]
    holds, parts = [], []
    for init in ("rerandomized", "rerandomized-keep-embeddings"):
        runs = _entropies(study, init)
        flat = mean(run[-1] - run[0] for run in runs) < mean(
            run[-1] - run[0] for run in _entropies(study, "trained")
        )
        holds += [flat, separate([mean(run) for run in runs], trained)]
        parts.append(f"`{init}` {_ends(runs, '.2f')}")
    return ["Token entropy of the re-randomised is flat and lower", listed(parts), _verdict(holds)]


def _control_high(study: dict[str, Any]) -> list[str]:
    control = [mean(run) for run in _entropies(study, "control")]
    holds = [
        separate([mean(run) for run in _entropies(study, init)], control)
        for init in LOOKS
        if init != "control"
    ]
    here = f"{_ends(_entropies(study, 'control'), '.2f')}, above all others"
    if not all(holds):
        here = f"{_ends(_entropies(study, 'control'), '.2f')}"
    return ["Token entropy of the control is high", here, _verdict(holds)]


def _entropy_random(study: dict[str, Any]) -> list[str]:
    trained = _entropies(study, "trained")
    runs = _entropies(study, "random")
    holds = [
        mean(run[-1] - run[0] for run in runs) < mean(run[-1] - run[0] for run in trained),
        separate([mean(run) for run in runs], [mean(run) for run in trained]),
    ]
    here = f"`random` {_ends(runs, '.2f')}, trained {_ends(trained, '.2f')}"
    return ["Token entropy of step 0 is flat and lower", here, _verdict(holds)]


def _loss_recovered(study: dict[str, Any]) -> list[str]:
    ce = {init: at_layers(of_init(study, init)[0], "ce")[0] for init in LOOKS}
    others = [value for init, value in ce.items() if init != "trained"]
    here = f"CE {ce['trained']:.2f} trained, {min(others):.2f} to {max(others):.2f} the others"
    return [
        "The CE score means something for trained alone",
        here,
        _verdict([ce["trained"] < min(others)]),
    ]
