"""docs/evidence/training.md from the JSON of `benchmarks.training`.

python -m benchmarks.training_page
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.markdown import EVIDENCE, made, paragraph, table
from benchmarks.training_figures import (
    Kind,
    Tuned,
    best_of_sweep,
    by_kind,
    loss,
    of_scale,
    tuned_by_kind,
)

SCALES = ("none", "log", "sqrt", "linear")


def training_page(content: dict[str, Any]) -> str:
    """Markdown, with the studies that the JSON has."""
    store = content["store"]
    about = paragraph(
        f"The model is stories260k, a trained Llama of 260 thousand parameters "
        f"({len(store['layers'])} layers, d_model {store['d_model']}); the text is "
        f"{store['num_tokens']:,} tokens of TinyStories in sequences of "
        f"{store['context_length']}, harvested. FVU is in raw units, over sequences that were "
        "not trained on; position 0 and special tokens are out; a mean over layers is the plain "
        "mean of the layers' FVUs. It is one small model on one kind of text, and runs are "
        "short: what is seen here need not hold for a large one."
    )
    parts = [SECTIONS[name](content[name]) for name in _committed(content)]
    return f"""# Training choices on stories260k

<!-- Made by `make results-training` from training.json; edit benchmarks/training_page.py. -->

{about}

{(chr(10) * 2).join(parts)}

## How it was made

<!-- not run: needs the stories260k model and the TinyStories text, and half an hour -->
```sh
python -m benchmarks.training --model MODEL --dataset TEXT --out runs/training \\
    --json docs/evidence/training.json
make results-training
```

{_cost(content)}
"""


def _committed(content: Mapping[str, Any]) -> list[str]:
    """Studies made from committed code; others are none."""
    return [
        name
        for name in SECTIONS
        if name in content and "uncommitted" not in content[name]["commit"]
    ]


def _cost(content: dict[str, Any]) -> str:
    said = []
    for name in _committed(content):
        study = content[name]
        said.append(
            f"- `{name}`, {study['seconds']:,.0f} s since the last start, beside other programs. "
            f"{made(study)}"
        )
    return "\n".join(paragraph(" ".join(text.split())) for text in said)


def _commands(study: dict[str, Any]) -> str:
    lines = [
        " \\\n    ".join(textwrap.wrap(line, 94, break_long_words=False, break_on_hyphens=False))
        for line in study["commands"]
    ]
    text = "\n".join(lines)
    return f"<!-- not run: needs the store of stories260k, and minutes -->\n```sh\n{text}\n```"


def _listed(values: Sequence[Any]) -> str:
    words = [f"{value:,}" if isinstance(value, int) else str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _sweep(study: dict[str, Any]) -> str:
    best = best_of_sweep(study)
    rates = sorted({sae["lr"] for sae in study["saes"]})
    fvu = {(sae["num_latents"], sae["k"], sae["lr"]): sae for sae in study["saes"]}
    rows = [
        [
            f"{size:,}",
            str(k),
            *(f"{fvu[size, k, rate]['fvu']:.4f}" for rate in rates),
            "inside" if of.is_inside else "at an end",
            f"{of.saes[0]['fvu_pca']:.4f}",
            f"{of.saes[0]['dead_fraction']:.1%}",
        ]
        for (size, k), of in best.items()
    ]
    head = ["latents", "k", *(f"FVU at {rate:g}" for rate in rates), "best rate",
            "PCA of rank k", "dead at the best"]  # fmt: skip
    return f"""## FVU against L0

{_commands(study)}

![Validation FVU against L0, by number of latents and by layer](training/sweep.png)

{_sweep_sentence(best, study)}

FVU, mean over layers, and that of the k leading principal directions of each layer.

{table(head, rows)}"""


def _sweep_sentence(best: Mapping[tuple[int, int], Tuned], study: dict[str, Any]) -> str:
    rates = sorted({sae["lr"] for sae in study["saes"]})
    inside = sum(of.is_inside for of in best.values())
    orders = []
    for k in sorted({k for _, k in best}):
        for rate in rates:
            of_rate = {
                sae["num_latents"]: sae["fvu"]
                for sae in study["saes"]
                if (sae["lr"], sae["k"]) == (rate, k) and sae["fvu"] is not None
            }
            orders.append((k, rate, sorted(of_rate, key=of_rate.__getitem__)))
    said = []
    for k in sorted({k for k, *_ in orders}):
        mine = [(rate, order) for each, rate, order in orders if each == k]
        if all(order == mine[0][1] for _, order in mine):
            said.append(f"at k {k} {_listed(mine[0][1])} at every rate")
        else:
            said.append(
                f"at k {k} " + ", ".join(f"{_listed(order)} at {rate:g}" for rate, order in mine)
            )
    exact = sorted({k for (_, k), of in best.items() if of.saes[0]["fvu_pca"] < 1e-6})
    text = (
        f"The figure has each SAE at the best of the rates {_listed([f'{r:g}' for r in rates])}. "
        f"In {inside} of {len(best)} cases that is inside the grid; in the others a rate beyond "
        "its end may be better, so no number of latents is said to be the best at any k. Numbers "
        f"of latents from the lowest FVU to the highest: {'; '.join(said)}. "
    )
    if exact:
        text += (
            f"With k {_listed(exact)}, the width of the rows, PCA has nothing left to explain, and "
            "no SAE shows anything there. "
        )
    text += (
        f"All took {study['num_steps']:,} steps on the same {study['num_rows']:,} rows, with one "
        "seed: it is what they reach on equal rows, and says nothing of where longer training "
        "would end."
    )
    return paragraph(text)


def _layers(study: dict[str, Any]) -> str:
    found = by_kind(study)
    small, large = sorted({sae["num_latents"] for sae in study["saes"]})
    kinds = [
        (("all", large), f"one of {large:,}"),
        (("each", small), f"each of {small:,}"),
        (("each", large), f"each of {large:,}"),
        (("all", small), f"one of {small:,}"),
    ]
    num_layers = len(next(iter(found["all", large].values())))
    head = ["layer", *(label for _, label in kinds)]
    rows = [
        [str(layer), *(_spread([run[layer] for run in found[key].values()]) for key, _ in kinds)]
        for layer in range(num_layers)
    ]
    tuned = tuned_by_kind(study)
    rows.append(["rate", *(", ".join(_rate(of) for of in tuned[key]) for key, _ in kinds)])
    seeds = len(found["all", large])
    sentences = [
        _held_against(found, one, other, setting, _inside(study, one, other))
        for one, other, setting in (
            (("all", large), ("each", small), f"At equal total latents ({large:,})"),
            (("all", large), ("each", large), f"At {large:,} latents an SAE and equal rows"),
            (("all", small), ("each", small), f"At {small:,} latents an SAE and equal rows"),
        )
    ]
    about = paragraph(
        f"`--layers each` trains, beside one SAE for all layers, one for each single layer, on "
        f"that layer's rows of the same batches: {num_layers} single-layer SAEs see together the "
        f"rows that the multi-layer one sees, {study['num_rows']:,} in {study['num_steps']:,} "
        f"steps, so each of their steps is 1/{num_layers} as large. {seeds} seeds, which set the "
        "initial weights alone; the rows and their order are the same. Every SAE is at the "
        "learning rate of its lowest FVU, mean over seeds, of those of the table; `*` marks one "
        "at an end of the grid, beyond which a better one may lie. Layers are compared one by "
        "one: a mean over layers would hold one SAE against the mean of several."
    )
    return f"""## One SAE for all layers, or one for each

{about}

{_commands(study)}

![Validation FVU by layer, one SAE for all layers against one for each](training/layers.png)

{paragraph(" ".join(sentences))}

Validation FVU: mean over seeds, lowest to highest in brackets.

{table(head, rows)}"""


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ({min(values):.4f}–{max(values):.4f})"


def _rate(of: Tuned) -> str:
    return f"{of.rate:g}{'' if of.is_inside else '*'}"


def _inside(study: dict[str, Any], one: Kind, other: Kind) -> list[int]:
    """Layers at which both are at a rate inside the grid."""
    tuned = tuned_by_kind(study)
    (whole,), each = tuned[one], tuned[other]
    return [layer for layer, of in enumerate(each) if of.is_inside and whole.is_inside]


def _held_against(
    found: dict[tuple[str, int], dict[int, list[float]]],
    one: tuple[str, int],
    other: tuple[str, int],
    setting: str,
    compared: Sequence[int],
) -> str:
    """Where the multi-layer SAE's worst seed beats the others' best, and the other way round."""
    ours, theirs = list(found[one].values()), list(found[other].values())
    lower: list[int] = []
    higher: list[int] = []
    neither: list[int] = []
    for layer in compared:
        a, b = [run[layer] for run in ours], [run[layer] for run in theirs]
        (lower if max(a) < min(b) else higher if min(a) > max(b) else neither).append(layer)
    said = [
        f"{words} at layer{'s' if len(layers) > 1 else ''} {_listed(layers)}"
        for words, layers in (
            ("lower, whichever the seeds,", lower),
            ("higher, whichever the seeds,", higher),
            ("not told apart by these seeds", neither),
        )
        if layers
    ]
    if not compared:
        return f"{setting}, every layer has a best rate at an end of the grid: none is compared."
    if ends := [layer for layer in range(len(ours[0])) if layer not in compared]:
        said.append(
            f"not compared, for a best rate at an end of the grid, at layers {_listed(ends)}"
        )
    ratios = [
        mean(run[layer] for run in ours) / mean(run[layer] for run in theirs) for layer in compared
    ]
    return (
        f"{setting}, the multi-layer SAE's FVU is {min(ratios):.2f} to {max(ratios):.2f} times "
        f"that of the layer's own SAE; it is {'; '.join(said)}."
    )


def _tokens(study: dict[str, Any]) -> str:
    saes = study["saes"]
    sizes = sorted({sae["num_latents"] for sae in saes})
    most = max(sae["unique_tokens"] for sae in saes)
    rows = []
    for epochs in sorted({sae["epochs"] for sae in saes}, reverse=True):
        of = [sae for sae in saes if sae["epochs"] == epochs]
        cells = [f"{of[0]['unique_tokens']:,}", str(epochs), f"{of[0]['num_steps']:,}"]
        for size in sizes:
            held_out = fvu_of(study, size, epochs)
            trained = [mean(s["trained_fvu_by_layer"]) for s in of if s["num_latents"] == size]
            ratio = mean(held_out) / mean(fvu_of(study, size, 1))
            cells += [_spread(held_out), f"{ratio:.2f}", f"{mean(trained):.4f}"]
        rows.append(cells)
    head = ["unique tokens", "epochs", "steps"]
    for size in sizes:
        head += [f"{size:,} latents: held out", "÷ all", "trained on"]
    sentences = " ".join(_price(study, size, most) for size in sizes)
    proof = paragraph(
        "The stories are shuffled before they are packed, because those of the file change in kind "
        f"on the way. The last {study['num_held_out']} sequences are held out, a store of their "
        "own; each part is the first sequences of the rest, and the "
        f"{study['num_between']} sequences between are used by none. The script compares token "
        "ids: every part is the beginning of the whole, no held-out sequence is in a part, no "
        f"document is in both (the held-out ones have {study['held_out_documents']}), and every "
        "SAE's "
        "training.json names its part. `trained on` is FVU over as many sequences as are held "
        "out, the first of the store, which every part has. k 16, two seeds, and one learning "
        "rate for all, tuned for none."
    )
    return f"""## FVU against unique tokens

Cost of going over a small store several times, where a run with the transformer in the loop
would see new text at each step: equally many steps on 1/16 to all of the store.

{_commands(study)}

![FVU against unique tokens, held out and trained on](training/tokens.png)

{paragraph(sentences)} [How large](../how-large.md) says what to make of it.

Mean over layers and seeds, lowest to highest seed in brackets.

{table(head, rows)}

{proof}"""


def fvu_of(study: dict[str, Any], size: int, epochs: int) -> list[float]:
    """Held-out FVU, mean over layers, of each seed."""
    return [
        mean(sae["fvu_by_layer"])
        for sae in study["saes"]
        if (sae["num_latents"], sae["epochs"]) == (size, epochs)
    ]


def _price(study: dict[str, Any], size: int, most: int) -> str:
    whole = mean(fvu_of(study, size, 1))
    parts = [
        f"{mean(fvu_of(study, size, epochs)) / whole:.2f} with 1/{epochs}"
        for epochs in sorted({sae["epochs"] for sae in study["saes"]} - {1})
    ]
    return (
        f"With {size:,} latents, held-out FVU is {', '.join(parts)} of the {most:,} tokens, in "
        f"units of that with all of them, {whole:.4f}."
    )


def _mlp(study: dict[str, Any]) -> str:
    known = [sae for sae in study["saes"] if "diverged" not in sae]
    norms = _listed([f"{norm:.2f}" for norm in study["mean_norms"]])
    rows = [
        [
            scale,
            f"{sae['l1_weight']:g}",
            f"{sae['lr']:g}",
            f"{mean(sae['l0']):.1f}",
            f"{mean(sae['fvu']):.4f}",
            f"{sae['fvu'][0]:.3f} … {sae['fvu'][-1]:.3f}",
            f"{sae['l0'][0]:.1f} … {sae['l0'][-1]:.1f}",
            f"{sae['mse'][0]:.3f} … {sae['mse'][-1]:.3f}",
            f"{sae['l1'][0]:.2f} … {sae['l1'][-1]:.2f}",
            f"{loss(sae):.4f}",
        ]
        for scale in SCALES
        for sae in of_scale(known, scale)
    ]
    head = [
        "scaling", "`--l1`", "rate", "L0, mean", "FVU, mean", "FVU, first … last layer",
        "L0", "MSE", "L1", "loss",
    ]  # fmt: skip
    diverged = len(study["saes"]) - len(known)
    about = paragraph(
        f"ReLU SAEs with an L1 penalty on what each block's MLP adds to the stream, with each of "
        f"the four layer scalings, three learning rates and four weights of the penalty: "
        f"{len(study['saes'])} SAEs in one pass over {study['num_rows']:,} rows "
        f"({study['num_steps']:,} steps), one seed; {diverged or 'none'} diverged. The mean norms "
        f"of the layers are {norms}, so `log` is defined. L0, L1, MSE and FVU are by layer, over "
        "validation rows: L1 is the mean of Σ_j z_j ‖W_dec,j‖ divided by the layer's scale, MSE "
        "the mean of ‖x − x̂‖², both in the units of x."
    )
    return f"""## ReLU and L1 on MLP outputs, by layer scaling

{about}

{_commands(study)}

![FVU, MSE and L1 against L0 by layer, for each layer scaling](training/mlp.png)

{_mlp_sentence(known, study["d_model"])}

For each scaling and weight, the learning rate that left the lowest loss over validation rows (mean
over layers of FVU and of the weighted penalty, in the scaled units of the run).

{table(head, rows)}

{_best_by_scale(known)}"""


def _mlp_sentence(saes: Sequence[dict[str, Any]], num_channels: int) -> str:
    shown = []
    for scale in SCALES:
        of = of_scale(saes, scale)
        ratios = [sae["l0"][-1] / max(sae["l0"][0], 1e-9) for sae in of]
        shown.append(f"{scale} {min(ratios):.2f} to {max(ratios):.2f}")
    active = [mean(sae["l0"]) for scale in SCALES for sae in of_scale(saes, scale)]
    rates = sorted({sae["lr"] for sae in saes})
    chosen = [sae["lr"] for scale in SCALES for sae in of_scale(saes, scale)]
    inside = sum(rates[0] < rate < rates[-1] for rate in chosen)
    return paragraph(
        "A column is a scaling, a dot a weight of the penalty, at the learning rate of lowest "
        "loss. What the scalings change is how active latents are shared out between layers: L0 "
        f"of the last layer over that of the first is {'; '.join(shown)}. Of the rates tried "
        f"({_listed([f'{rate:g}' for rate in rates])}) the best is inside the grid in {inside} of "
        f"{len(chosen)} cases"
        + (
            ""
            if inside == len(chosen)
            else ", in the others at an end of it, beyond which a better one may lie"
        )
        + ". The runs are short and the rows narrow: "
        f"mean L0 goes from {min(active):.0f} to {max(active):.0f}, at {num_channels} channels, so "
        "this is no sparse regime, and what scalings do there is not shown."
    )


def _best_by_scale(saes: Sequence[dict[str, Any]]) -> str:
    """Mean FVU of each scaling at equal mean L0, between the weights of the table above."""
    fronts = {scale: front(of_scale(saes, scale)) for scale in SCALES}
    least = max(min(l0 for l0, _ in points) for points in fronts.values())
    most = min(max(l0 for l0, _ in points) for points in fronts.values())
    shown = np.exp(np.linspace(np.log(least), np.log(most), 4))
    at = {
        scale: np.exp(np.interp(np.log(shown), *np.log(points).T))
        for scale, points in fronts.items()
    }
    rows = [[scale, *(f"{fvu:.4f}" for fvu in values)] for scale, values in at.items()]
    ordered = sorted(SCALES, key=lambda scale: float(at[scale][0]))
    rates = sorted({sae["lr"] for sae in saes})
    chosen = {sae["lr"] for scale in SCALES for sae in of_scale(saes, scale)}
    order = (
        "Some are at a rate at an end of the grid, so no order of scalings follows."
        if {rates[0], rates[-1]} & chosen
        else f"At the sparsest end that all reach the order is {_listed(ordered)}."
    )
    text = paragraph(
        "Mean FVU by scaling at equal mean L0, interpolated between the weights of the table (both "
        f"logarithmic). {order} With one seed, small differences mean nothing."
    )
    head = ["scaling", *(f"L0 {l0:.1f}" for l0 in shown)]
    return f"{text}\n\n{table(head, rows)}"


def front(saes: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Mean L0 and mean FVU of each, from the sparsest on."""
    return sorted((mean(sae["l0"]), mean(sae["fvu"])) for sae in saes)


SECTIONS = {"sweep": _sweep, "layers": _layers, "tokens": _tokens, "mlp": _mlp}


def main() -> None:
    content = json.loads((EVIDENCE / "training.json").read_text())
    (EVIDENCE / "training.md").write_text(training_page(content))


if __name__ == "__main__":
    main()
