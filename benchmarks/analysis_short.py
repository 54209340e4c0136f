"""The first section of docs/evidence/analysis.md: the answers, with their numbers."""

from statistics import mean
from typing import Any

from benchmarks.analysis_figures import (
    by_size,
    of_init,
)
from benchmarks.analysis_numbers import (
    at_all_layers,
    at_one_layer,
    by_mass,
    likeness_and_variance,
    listed,
    mean_expected,
    middle_of,
    pearson,
    ratio,
    spread,
)
from benchmarks.markdown import paragraph


def short_section(content: dict[str, Any]) -> str:
    """The answers, with their numbers."""
    study, demo = content["variants"], content["demo"]["saes"]
    trained = of_init(study, "trained")
    num_layers = len(trained[0]["layers"])
    pair = spread([ratio("mass", "single_over_aggregate")(s) for s in trained], ".0%")
    ordered = by_mass(study)
    points = likeness_and_variance(content)
    shares = mean_expected(study, "trained")
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
        f"layer, as alike by cosine, {shares[1]:.0%}. That a latent here is active at several "
        "layers of a token says little more than that the residual stream is nearly the same "
        "there.",
        "**It depends on the dictionary**: "
        f"{_size_ends(content['sizes'])}.",
    ]  # fmt: skip
    items = "\n".join(_item(text) for text in points_text)
    return f"## In short\n\n{items}"


def _item(text: str) -> str:
    lines = paragraph(f"- {text}").splitlines()
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])


def _size_ends(study: dict[str, Any]) -> str:
    runs = by_size(study)
    k, middle = middle_of(k for _, k in runs), middle_of(size for size, _ in runs)
    sizes = [size for size, each in runs if each == k]
    least, most = (mean(map(ratio("mass"), runs[size, k])) for size in (sizes[0], sizes[-1]))
    by_k = {each: mean(map(ratio("mass"), saes)) for (n, each), saes in runs.items() if n == middle}
    active = listed([f"{value:.0%} at k {each}" for each, value in by_k.items()])
    return (
        f"{least:.0%} by mass with {sizes[0]:,} latents, {most:.0%} with {sizes[-1]:,}, both at k "
        f"{k}; with {middle:,}, {active}"
    )
