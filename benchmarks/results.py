"""`make results`: the pages of docs/evidence from the JSON beside them, figures' captions included.

python -m benchmarks.results
"""

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.benchmarks_page import benchmarks_page
from benchmarks.harvest_page import harvest_page
from benchmarks.intervals_page import intervals_page
from benchmarks.markdown import EVIDENCE, made, paragraph, table


def stories260k(content: dict[str, Any]) -> str:
    """The page of `benchmarks.stories260k`, Markdown."""
    store, settings = content["store"], content["settings"]
    num_layers = len(store["layers"])
    raw = [run for run in content["runs"] if run["loss_space"] == "raw"]
    seeds = len(raw)
    about = paragraph(
        f"A trained Llama of 260 thousand parameters ({num_layers} layers, d_model "
        f"{store['d_model']}) reads {store['num_tokens']:,} tokens of TinyStories in sequences of "
        f"{content['context_length']}. One SAE on all its layers: expansion factor "
        f"{settings['expansion_factor']} ({raw[0]['num_latents']:,} latents), k {settings['k']}, "
        f"{settings['epochs']} epochs, batches of {settings['batch_size']:,} rows, learning rate "
        f"{settings['lr']:g} with linear decay over the last {settings['lr_decay']:.0%} of the "
        f"steps, {settings['validation_fraction']:.0%} of the sequences "
        f"({raw[0]['num_sequences']}) held out. Each loss space with {seeds} seeds; a seed sets "
        "the initial weights, the order of the rows and which sequences are held out. All numbers "
        "below are over held-out sequences, but norms and cosines, which are over all."
    )
    command = content["command"].replace(" --", " \\\n    --")
    return f"""# stories260k: the whole path on a real model

<!-- Made by `make results` from stories260k.json; edit benchmarks/results.py instead. -->

{about}

## Both loss spaces

FVU is in raw units whatever the loss space; delta CE is what the cross-entropy of the next token
rises by, in nats, when the layer's live activations are replaced by their reconstructions; special
tokens are out. Each number is the mean over the seeds, with the FVU of each beside it.

{_both_spaces(content["runs"], num_layers)}

{_position_0(store)}

{_loss_spaces_sentence(content["runs"], num_layers)}

{_dead(content["runs"])}

## Figures

![FVU and delta CE by layer in both loss spaces](stories260k/comparison.png)

{_comparison_sentence(raw)}

{_shown(content["shown"])}

{_figures(content["readings"])}

## How it was made

<!-- not run: needs the stories260k model and the TinyStories text, and a quarter of an hour -->
```sh
{command}
```

{made(content)}
"""


def _mean(runs: Sequence[dict[str, Any]], layer: int, column: str) -> float:
    return float(statistics.mean(run["layers"][layer][column] for run in runs))


def _each(runs: Sequence[dict[str, Any]], layer: int) -> str:
    return ", ".join(f"{run['layers'][layer]['fvu_position_0_in']:.4f}" for run in runs)


def _position_0(store: dict[str, Any]) -> str:
    special, sequences = store["special_position_0"], store["num_sequences"]
    if special == sequences:
        return paragraph(
            f"Each of the {sequences:,} sequences opens with the tokenizer's BOS, which is special "
            "and therefore out, so here position 0 in and position 0 out are the same rows."
        )
    return paragraph(
        f"{special:,} of the {sequences:,} sequences have a special token at position 0, which "
        "stays out."
    )


def _both_spaces(runs: Sequence[dict[str, Any]], num_layers: int) -> str:
    columns: list[tuple[str, Callable[[Sequence[dict[str, Any]], int], str]]] = [
        ("FVU, position 0 in", lambda of, i: f"{_mean(of, i, 'fvu_position_0_in'):.4f}"),
        ("each seed", _each),
        ("FVU, position 0 out", lambda of, i: f"{_mean(of, i, 'fvu_position_0_out'):.4f}"),
        ("L0", lambda of, i: f"{_mean(of, i, 'l0'):.2f}"),
        ("delta CE", lambda of, i: f"{_mean(of, i, 'delta_ce'):.4f}"),
        ("KL", lambda of, i: f"{_mean(of, i, 'kl'):.4f}"),
    ]
    rows = []
    for space in ("raw", "standardized"):
        of = [run for run in runs if run["loss_space"] == space]
        rows += [[space, str(i), *(text(of, i) for _, text in columns)] for i in range(num_layers)]
    return table(["loss space", "layer", *(name for name, _ in columns)], rows)


def _loss_spaces_sentence(runs: Sequence[dict[str, Any]], num_layers: int) -> str:
    by_space = {
        space: [run for run in runs if run["loss_space"] == space]
        for space in ("raw", "standardized")
    }

    def overall(space: str, column: str) -> float:
        return statistics.mean(_mean(by_space[space], i, column) for i in range(num_layers))

    def better(column: str) -> str:
        raw, standardized = overall("raw", column), overall("standardized", column)
        first = "raw" if raw < standardized else "standardized"
        return f"{first}, {min(raw, standardized):.4f} against {max(raw, standardized):.4f}"

    def of_seed(run: dict[str, Any]) -> float:
        return float(statistics.mean(layer["delta_ce"] for layer in run["layers"]))

    pairs = list(zip(by_space["raw"], by_space["standardized"], strict=True))
    cheaper = sum(of_seed(standardized) < of_seed(raw) for raw, standardized in pairs)

    return paragraph(
        "Averaged over layers and seeds, the loss space with the lower FVU is "
        f"{better('fvu_position_0_in')}; the one with the lower delta CE is {better('delta_ce')}. "
        f"Delta CE is lower with standardized in {cheaper} of {len(pairs)} seeds. Both were "
        "trained at one learning rate, tuned for neither, so differences as small as these tell "
        "nothing of which is better where each has its own. `--loss-space standardized` is the "
        "default because it weighs every row the same whatever its norm, at no cost that shows "
        "here."
    )


def _dead(runs: Sequence[dict[str, Any]]) -> str:
    by_space = "; ".join(
        f"{space} {', '.join(str(run['num_dead']) for run in runs if run['loss_space'] == space)}"
        for space in ("raw", "standardized")
    )
    return paragraph(
        f"Latents of {runs[0]['num_latents']:,} that no held-out row uses at any layer, by seed: "
        f"{by_space}."
    )


def _comparison_sentence(raw: Sequence[dict[str, Any]]) -> str:
    last = len(raw[0]["layers"]) - 1
    ours = _mean(raw, last, "fvu_position_0_in")
    return paragraph(
        f"Left: at layer {last} the raw line stands at {ours:.3f}. A dot is a seed, a line the "
        "mean of its loss space."
    )


def _shown(run: dict[str, Any]) -> str:
    return paragraph(
        f"The other figures are of the run in {run['loss_space']} loss space with seed "
        f"{run['seed']}."
    )


def _figures(readings: dict[str, float]) -> str:
    alive = readings["num_alive"]
    shown = [
        (
            "layer_distribution.png",
            "P(layer | latent) as a heat map",
            f"The white line crosses layer 1 at latent {readings['num_below_one_layer']:.0f}: so "
            f"many of the {alive:,.0f} living latents have a mean layer below 1.",
        ),
        (
            "fvu_delta_ce.png",
            "FVU and delta CE by layer",
            f"The last layer has an FVU of {readings['last_fvu']:.3f} and costs "
            f"{readings['last_delta_ce']:.3f} nats a token.",
        ),
        (
            "norm_cosine.png",
            "L2 norm and pooled cosine with the next layer, by layer",
            f"The mean norm grows from {readings['first_norm']:.1f} to "
            f"{readings['last_norm']:.1f}; the last two layers' pooled cosine is "
            f"{readings['last_cosine']:.2f}.",
        ),
        (
            "density.png",
            "Histogram of latent density",
            f"Half of the latents lie to the right of {readings['log10_median_density']:.2f}, that "
            f"is, are active at more than {10 ** readings['log10_median_density']:.1%} of the "
            "rows.",
        ),
    ]
    return "\n\n".join(
        f"![{alt}](stories260k/{name})\n\n{paragraph(text)}" for name, alt, text in shown
    )


PAGES: dict[str, Callable[[Any], str]] = {
    "stories260k": stories260k,
    "harvest": harvest_page,
    "intervals": intervals_page,
    "benchmarks": benchmarks_page,
}


def main() -> None:
    for name, page in PAGES.items():
        content = json.loads((EVIDENCE / f"{name}.json").read_text())
        (EVIDENCE / f"{name}.md").write_text(page(content))


if __name__ == "__main__":
    main()
