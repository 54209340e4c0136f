"""docs/evidence/harvest.md from the JSON of `benchmarks.harvest_variants`."""

from collections.abc import Sequence
from typing import Any

from benchmarks.harvest_variants import FIGURE
from benchmarks.markdown import made, paragraph, table

INIT_TEXT = {
    "trained": "the weights as they are",
    "rerandomized": "every parameter redrawn from a Gaussian of its own mean and variance",
    "rerandomized-keep-embeddings": "the same, embedding and unembedding kept",
    "random": "the config's own initialisation",
    "control": "trained weights, the token embeddings replaced by noise at every position",
}


def harvest_page(content: dict[str, Any]) -> str:
    """Markdown."""
    texts = content["texts"]
    first = next(iter(texts.values()))[0]
    num_layers = len(first["mean_norm"])
    sizes = " and ".join(
        f"{variants[0]['num_tokens']:,} tokens of {name}" for name, variants in texts.items()
    )
    about = paragraph(
        f"stories260k, a trained Llama of 260 thousand parameters ({num_layers} layers), and the "
        f"four random variants of it that `mlsae harvest --init` makes, each run over {sizes} in "
        f"sequences of {content['context_length']}. It was trained on TinyStories; WikiText-2 is "
        "foreign to it. Everything below is of `resid_post` and comes from the stores' moments, "
        "position 0 and special tokens left out."
    )
    variants = "\n".join(f"- `{init}`: {text}." for init, text in INIT_TEXT.items())
    sections = "\n\n".join(_section(name, of) for name, of in texts.items())
    return f"""# The residual stream of a trained transformer and of its random variants

<!-- Made by `make results` from harvest.json; edit benchmarks/harvest_page.py instead. -->

{about}

{variants}

![Mean norm and cosine of adjacent layers by layer, for five variants on two texts]({FIGURE})

{_reading(texts)}

{sections}

## How it was made

<!-- not run: needs the stories260k model and both texts, and some minutes -->
```sh
{content["command"].replace(" --", " " + chr(92) + chr(10) + "    --")}
```

{made(content)}
"""


def _section(name: str, variants: Sequence[dict[str, Any]]) -> str:
    layers = range(len(variants[0]["mean_norm"]))
    norms = [
        [f"`{variant['init']}`", *(f"{norm:.3f}" for norm in variant["mean_norm"])]
        for variant in variants
    ]
    cosines = [
        [f"`{variant['init']}`", *(f"{cosine:.4f}" for cosine in variant["adjacent_cosine"])]
        for variant in variants
    ]
    pairs = [f"{layer}, {layer + 1}" for layer in layers][:-1]
    return f"""## {name}

Mean L2 norm of a row, by layer:

{table(["variant", *map(str, layers)], norms)}

Cosine of adjacent layers about their means, pooled over rows:

{table(["variant", *pairs], cosines)}"""


def _reading(texts: dict[str, Sequence[dict[str, Any]]]) -> str:
    sentences = []
    for name, variants in texts.items():
        trained = variants[0]
        growth = trained["mean_norm"][-1] / trained["mean_norm"][0]
        sentences.append(
            f"On {name} the trained model's norm grows {growth:.1f}-fold from the first layer to "
            f"the last and its adjacent cosines lie between {min(trained['adjacent_cosine']):.2f} "
            f"and {max(trained['adjacent_cosine']):.2f}."
        )
        for variant in variants[1:]:
            growth = variant["mean_norm"][-1] / variant["mean_norm"][0]
            sentences.append(
                f"`{variant['init']}`: {growth:.1f}-fold, "
                f"{min(variant['adjacent_cosine']):.2f} to {max(variant['adjacent_cosine']):.2f}."
            )
    return paragraph(" ".join(sentences))
