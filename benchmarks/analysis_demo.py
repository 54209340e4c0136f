"""The section of docs/evidence/analysis.md on the demo model."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.analysis_figures import (
    adjacent_cosine,
)
from benchmarks.analysis_numbers import (
    at_layers,
    at_one_layer,
    code,
    ratio,
    spread,
)
from benchmarks.analysis_where import layer_cells
from benchmarks.markdown import paragraph, table


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
        ("delta_ce", ".3f"), ("loss_recovered_zero_eligible", ".3f"),
        ("loss_recovered_mean", ".3f"), ("token_entropy", ".2f"),
        ("adjacent_cosine_pooled", ".3f"),
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
        [layer_cells(saes)],
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
        "The layers of the demo model are alike (pooled adjacent cosine "
        f"{mean(map(adjacent_cosine, saes)):.3f} on "
        f"average), and a latent that is active for a token is so at "
        f"{mean(sae['layer_variance']['layers_of_a_pair'] for sae in saes):.2f} of "
        f"{len(saes[0]['layers'])} layers, at one alone in "
        f"{mean(map(at_one_layer, saes)):.0%} of the cases. Single-token over aggregate variance "
        f"is {single} by mass, {uniform} pair-uniform, {coded} as coded: most of the spread of a "
        "latent over layers is at single tokens, the reverse of the published claim."
    )
