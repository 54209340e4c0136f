"""The whole path on a real model, in both loss spaces and with three seeds each.

    python -m benchmarks.stories260k --model DIR --dataset FILE --out DIR \\
        --json docs/evidence/stories260k.json

MODEL is karpathy's 260K-parameter Llama trained on TinyStories, in Hugging Face format; the text is
1,000 of those stories, one {"text": …} a line. Writes the JSON that `benchmarks.results` makes the
page from, and the figures beside it.
"""

import argparse
import datetime
import json
import shlex
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.made import commit, machine
from mlsae.analyze import Analysis, AnalyzeConfig
from mlsae.analyze import run as analyze
from mlsae.analyze.results.figures.style import STYLE
from mlsae.harvest import HarvestConfig
from mlsae.harvest import run as harvest
from mlsae.store import open_store
from mlsae.train import TrainConfig
from mlsae.train import run as train

LOSS_SPACES = ("raw", "standardized")
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {
    "expansion_factor": 16,
    "k": 16,
    "epochs": 4,
    "batch_size": 4096,
    "lr": 1e-3,
    "lr_decay": 0.2,
    "validation_fraction": 0.05,
}
CONTEXT_LENGTH = 256
SHOWN = ("raw", 0)
"""The run whose figures are kept."""
FIGURES = ("layer_distribution.png", "norm_cosine.png", "density.png")
"""Figures of the analysis that the page shows."""
COLUMNS = (
    "layer",
    "num_rows_position_0_in",
    "fvu_position_0_in",
    "num_rows_position_0_out",
    "fvu_position_0_out",
    "fvu_published",
    "l0",
    "ce",
    "ce_store",
    "ce_sae",
    "delta_ce",
    "kl",
)


def walk(model: str, dataset: str, out: Path) -> tuple[dict[str, Any], dict[Any, Analysis]]:
    """Harvest once, train and analyze six times; what was finished before is kept."""
    store_path = out / "acts"
    harvest(
        HarvestConfig(model=model, dataset=dataset, out=store_path, context_length=CONTEXT_LENGTH)
    )
    analyses, runs = {}, []
    for loss_space in LOSS_SPACES:
        for seed in SEEDS:
            name = f"{loss_space}-{seed}"
            print(f"\n{name}", flush=True)
            train(
                TrainConfig(
                    cache=store_path,
                    out=out / name,
                    loss_space=loss_space,
                    seed=seed,
                    resume=True,
                    **SETTINGS,
                )
            )
            analysis = analyze(
                AnalyzeConfig(cache=store_path, sae=out / name, out=out / f"analysis-{name}")
            )
            analyses[loss_space, seed] = analysis
            runs.append(describe(analysis, loss_space, seed))
    store = open_store(store_path)
    measured = {
        "store": {
            "store_id": store.store_id,
            "num_tokens": store.num_tokens,
            "layers": list(store.layers),
            "d_model": store.d_model,
            "encoding": store.encoding,
            "special_position_0": int((store.token_flags()[:: store.context_length] != 0).sum()),
            "num_sequences": store.num_tokens // store.context_length,
        },
        "runs": runs,
    }
    return measured, analyses


def describe(analysis: Analysis, loss_space: str, seed: int) -> dict[str, Any]:
    """One run as JSON."""
    return {
        "loss_space": loss_space,
        "seed": seed,
        "num_latents": analysis.summary["overall"]["num_latents"],
        "num_dead": analysis.summary["overall"]["num_dead"],
        "num_sequences": analysis.summary["num_sequences"],
        "ce_tokens": analysis.summary["cross_entropy"]["num_tokens"],
        "layers": [{name: row[name] for name in COLUMNS} for row in analysis.layers.to_pylist()],
    }


def readings(analysis: Analysis) -> dict[str, float]:
    """Numbers that can be read in the shown run's figures."""
    layers, latents = analysis.layers.to_pylist(), analysis.latents
    alive = latents.filter(np.logical_not(latents["dead"].to_numpy(zero_copy_only=False)))
    density = alive["density"].to_numpy()
    mean_layer = alive["layer_mean"].to_numpy()
    return {
        "first_norm": layers[0]["norm"],
        "last_norm": layers[-1]["norm"],
        "last_cosine": layers[-2]["adjacent_cosine_pooled"],
        "last_fvu": layers[-1]["fvu"],
        "last_delta_ce": layers[-1]["delta_ce"],
        "log10_median_density": float(np.log10(np.median(density))),
        "num_alive": len(alive),
        "num_below_one_layer": int((mean_layer < 1).sum()),
    }


def draw_layers(shown: Analysis, path: Path) -> None:
    """FVU, by channel means and as published, and delta CE of one run by layer."""
    column = {name: shown.layers[name].to_numpy() for name in shown.layers.column_names}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.0), layout="constrained")
        fvu, delta_ce = figure.subplots(1, 2)
        fvu.plot(column["layer"], column["fvu"], "o-", color="#0072B2", label="channel means")
        published = {"color": "#D55E00", "label": "one mean, as published"}
        fvu.plot(column["layer"], column["fvu_published"], "s--", **published)
        fvu.set(title="Variance unexplained", xlabel="layer", ylabel="FVU")
        fvu.legend()
        delta_ce.plot(column["layer"], column["delta_ce"], "o-", color="#0072B2")
        delta_ce.set(
            title="Cross-entropy added by one layer", xlabel="layer", ylabel="nats / token"
        )
        for axes in (fvu, delta_ce):
            axes.set_xticks(column["layer"])
            axes.set_ylim(bottom=0)
        figure.savefig(path)


def draw_comparison(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out FVU and delta CE by layer: a line a loss space, a dot a seed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.0), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, column in zip(panels, ("fvu_position_0_in", "delta_ce"), strict=True):
            for space, colour in zip(LOSS_SPACES, ("#0072B2", "#D55E00"), strict=True):
                values = np.array(
                    [
                        [layer[column] for layer in run["layers"]]
                        for run in runs
                        if run["loss_space"] == space
                    ]
                )
                layers = np.arange(values.shape[1])
                axes.plot(layers, values.mean(0), color=colour, label=f"{space} loss")
                axes.plot(np.tile(layers, (len(values), 1)), values, "o", ms=3, color=colour)
            axes.set_xticks(layers)
            axes.set_xlabel("layer")
        panels[0].set(title="Variance unexplained, held out", ylabel="FVU")
        panels[1].set(title="Cross-entropy added by one layer", ylabel="nats / token")
        for axes in panels:
            axes.set_ylim(bottom=0)
            axes.legend()
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory of stories260k")
    parser.add_argument("--dataset", required=True, help="TinyStories, .jsonl")
    parser.add_argument("--out", required=True, type=Path, help="store, SAEs and analyses")
    parser.add_argument("--json", required=True, type=Path, help="result, with figures beside it")
    arguments = parser.parse_args()
    at_commit = commit()
    measured, analyses = walk(arguments.model, arguments.dataset, arguments.out)
    shown = analyses[SHOWN]
    folder = arguments.json.parent / arguments.json.stem
    folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        shutil.copy(shown.path / "figures" / name, folder)
    draw_layers(shown, folder / "fvu_delta_ce.png")
    draw_comparison(measured["runs"], folder / "comparison.png")
    content = {
        "command": f"python -m benchmarks.stories260k {shlex.join(sys.argv[1:])}",
        "commit": at_commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "settings": SETTINGS,
        "context_length": CONTEXT_LENGTH,
        "shown": dict(zip(("loss_space", "seed"), SHOWN, strict=True)),
        "readings": readings(shown),
        **measured,
    }
    arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    fvu = {
        space: statistics.mean(
            layer["fvu_position_0_in"]
            for run in measured["runs"]
            if run["loss_space"] == space
            for layer in run["layers"]
        )
        for space in LOSS_SPACES
    }
    print(json.dumps({"mean_fvu": fvu}))


if __name__ == "__main__":
    main()
