"""The section of docs/evidence/analysis.md on how alike layers are."""

from typing import Any

from benchmarks.analysis_figures import (
    LOOKS,
    adjacent_cosine,
    bins,
    layer_pairs,
    of_init,
)
from benchmarks.analysis_numbers import (
    likeness_and_variance,
    listed,
    mean_expected,
    pearson,
    spearman,
    spread,
)
from benchmarks.markdown import paragraph, table


def similarity_section(content: dict[str, Any]) -> str:
    """Explanation by the likeness of the layers."""
    study = content["variants"]
    head = ["variant", "adjacent cosine", "two layers, one token", "two tokens, one layer",
            "pairs covered", "two tokens, two layers", "covered"]  # fmt: skip
    rows = []
    for init in LOOKS:
        actual, same, covered = mean_expected(study, init)
        _, other, covered_other = mean_expected(study, init, "neither")
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
        "Latents shared by two layers of one token, over bins that hold at least 30 pairs of "
        "either kind, and by pairs of different tokens as alike, weighed by the cosines of the "
        "first; "
        "`covered` is the share of the first in those bins. Adjacent cosine: pooled over the "
        "store's rows, about the layers' means (`adjacent_cosine_pooled` of `layers.parquet`), "
        "mean over layers."
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
        actual, same, covered = mean_expected(study, init)
        gaps.append(f"`{init}` {actual:.0%} and {same:.0%} (bins of {covered:.0%} of the pairs)")
    return paragraph(
        "Within each variant the curves lie close to one another: rows share latents as they are "
        "alike, whether they are one token's at two layers or two tokens' at one. Two layers of a "
        f"token share, and two tokens at one layer as alike: {listed(gaps)}. "
        f"{_between_variants(study)}"
    )  # fmt: skip


def _between_variants(study: dict[str, Any]) -> str:
    """Share of latents of two tokens at one layer in the widest bin that every variant has."""
    shares = [
        {round(at, 3): share for at, share, _ in bins(run["one_layer"], run["edges"])}
        for run in (of_init(study, init, "similarity")[0] for init in LOOKS)
    ]
    at = max(set.intersection(*(set(of) for of in shares)))
    here = [of[at] for of in shares]
    return (
        f"Variants differ more from each other: at a cosine of about {at:.2f}, two tokens at one "
        f"layer share {min(here):.0%} to {max(here):.0%}. Of the control few pairs can be held "
        "against each other, because no two of its tokens are alike."
    )


def _confound_sentence(content: dict[str, Any]) -> str:
    study = content["variants"]
    pairs = [of for init in LOOKS for of in layer_pairs(study, init)]
    cosine, shared = [of[0] for of in pairs], [of[1] for of in pairs]
    x, y = likeness_and_variance(content)
    alone = (x[:-1], y[:-1])
    return paragraph(
        f"Left, every two layers of every variant ({len(pairs)} points, mean over seeds): rank "
        f"correlation of centred cosine and share of latents {spearman(cosine, shared):.2f}. "
        "Right, single-token over aggregate variance by mass against the mean cosine of adjacent "
        f"layers: correlation {pearson(*alone):.2f} over the {len(alone[0])} variants, "
        f"{pearson(x, y):.2f} with the demo model, ranks {spearman(x, y):.2f}. With so few points "
        "this is a hint; the figure above it is the test."
    )
