"""docs/evidence/analysis.md and its figures from the JSON of `benchmarks.analysis`.

python -m benchmarks.analysis_page
"""

import json
from typing import Any

from benchmarks.analysis_demo import demo_section
from benchmarks.analysis_figures import draw_all
from benchmarks.analysis_likeness import similarity_section
from benchmarks.analysis_metrics import heap_section, metrics_section
from benchmarks.analysis_numbers import code, listed
from benchmarks.analysis_short import short_section
from benchmarks.analysis_variance import sizes_section, variance_section
from benchmarks.analysis_where import kinds_section, latents_section, layers_section
from benchmarks.harvest_page import INIT_TEXT
from benchmarks.markdown import EVIDENCE, made, paragraph


def analysis_page(content: dict[str, Any]) -> str:
    """Markdown."""
    store, study = content["store"], content["variants"]
    sae = study["saes"][0]
    num_seeds = len({of["seed"] for of in study["saes"]})
    about = paragraph(
        f"stories260k, a trained Llama of 260 thousand parameters ({len(store['layers'])} layers, "
        f"d_model {store['d_model']}), and the four random variants of it that `mlsae harvest "
        f"--init` makes, each run over {store['num_tokens']:,} tokens of TinyStories in sequences "
        f"of {store['context_length']}, documents shuffled because those of the file change in "
        f"kind on the way. On each, {num_seeds} SAEs on `resid_post` of all layers, of equal "
        f"settings but for the seed of the weights: {sae['num_latents']:,} latents, k {sae['k']}. "
        f"Everything is over {sae['num_sequences']} sequences that were held out from training "
        f"({sae['layers'][0]['num_rows']:,} rows a layer), position 0 and special tokens left out. "
        "All SAEs have one learning rate, tuned for none of the variants. "
        "Where a cell has brackets, it is the mean over seeds, lowest to highest. It is one small "
        "model on one kind of text: what is seen here need not hold for a large one."
    )
    variants = "\n".join(f"- `{init}`: {text}." for init, text in INIT_TEXT.items())
    sections = (
        short_section(content),
        _commands_section(content),
        metrics_section(study),
        heap_section(study, content["vocab_size"]),
        layers_section(study),
        variance_section(content),
        similarity_section(content),
        sizes_section(content["sizes"]),
        kinds_section(study),
        latents_section(study),
        demo_section(content["demo"]),
    )
    return f"""# Analyses of a trained transformer and its random variants

<!-- Made by `make results-analysis` from analysis.json; edit benchmarks/analysis_page.py. -->

{about}

{variants}

{(chr(10) * 2).join(sections)}

## How it was made

<!-- not run: needs the stories260k model and the TinyStories text, and half an hour -->
```sh
python -m benchmarks.analysis --model MODEL --dataset TEXT --out runs/analysis \\
    --json docs/evidence/analysis.json
make results-analysis
```

{_cost(content)}
"""


def _commands_section(content: dict[str, Any]) -> str:
    commands = content["variants"]["commands"]
    trained = [command for command in commands if "trained" in command]
    first = [next(c for c in trained if c.startswith(f"mlsae {w}")) for w in _WORDS]
    random = next(command for command in commands if "--init" in command)
    init = random.partition("--init ")[2]
    about = paragraph(
        "Every number below comes from the tables that these commands write. For a variant, the "
        f"harvest has `--init` in addition, such as `--init {init}`, and the names that say "
        "`trained` say the variant; `mlsae train` makes the seeds in one pass, and each is "
        "analyzed alone. All of them, as they were run, are in `analysis.json`. Columns and tables "
        "are defined in [tables](../reference/tables.md), formulas in [layers](../layers.md) and "
        "[metrics](../metrics.md)."
    )
    return f"## The commands\n\n{code(first)}\n\n{about}"


_WORDS = ("harvest", "train", "analyze")


def _cost(content: dict[str, Any]) -> str:
    studies = [content[name] for name in ("variants", "sizes", "demo")]
    seconds: dict[str, float] = {}
    for study in studies:
        for word, of in study["seconds"].items():
            seconds[word] = seconds.get(word, 0.0) + of
    took = listed([f"{word} {of:,.0f} s" for word, of in seconds.items()])
    cost = paragraph(
        f"The commands took, in seconds of one CPU core: {took}; the store and SAEs that two "
        "studies share are counted twice."
    )
    commits = ", ".join(sorted({study["commit"] for study in studies}))
    return f"{cost}\n\n{made({**content, 'date': studies[-1]['date'], 'commit': commits})}"


def main() -> None:
    content = json.loads((EVIDENCE / "analysis.json").read_text())
    draw_all(content, EVIDENCE / "analysis")
    (EVIDENCE / "analysis.md").write_text(analysis_page(content))


if __name__ == "__main__":
    main()
