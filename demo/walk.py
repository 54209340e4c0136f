"""The whole path on the embedded model and text: harvest, train, analyze, in a few minutes."""

from pathlib import Path

import click
import pyarrow.compute as pc

from mlsae.analyze import Analysis, AnalyzeConfig
from mlsae.analyze import run as analyze
from mlsae.base.units import counted, format_count
from mlsae.demo import model_path, text_path
from mlsae.harvest import HarvestConfig
from mlsae.harvest import run as harvest
from mlsae.train import TrainConfig
from mlsae.train import run as train

STORE, SAE, ANALYSIS = "acts", "sae", "analysis"


def stage_settings(out: Path) -> tuple[HarvestConfig, TrainConfig, AnalyzeConfig]:
    """Settings of the demo: 256,000 tokens, all six layers, an SAE of 1,024 latents, 16 a row."""
    return (
        HarvestConfig(
            model=str(model_path()),
            dataset=str(text_path("train")),
            out=out / STORE,
            max_tokens=256_000,
            context_length=256,
            batch_size=32,
        ),
        TrainConfig(
            cache=out / STORE,
            out=out / SAE,
            expansion_factor=16,
            k=16,
            batch_size=4096,
            epochs=4,
            lr=1e-3,
            validation_fraction=0.05,
            resume=True,
        ),
        AnalyzeConfig(cache=out / STORE, sae=out / SAE, out=out / ANALYSIS),
    )


def walk(to_harvest: HarvestConfig, to_train: TrainConfig, to_analyze: AnalyzeConfig) -> Analysis:
    """Harvest, train and analyze, and end with a table by layer and the figures' paths.

    Finished stages of an earlier walk are kept, an unfinished one is continued, and the analysis is
    made anew.

    Args:
        to_harvest: makes the store.
        to_train: makes the SAE from it; with `resume`, or a second walk is refused.
        to_analyze: analyzes both.

    Raises:
        InputError: a directory holds something else, or what other settings made.
        ResourceError: too little memory or disk.
    """
    click.echo(f"1. harvest: activations of {to_harvest.model}")
    harvest(to_harvest)
    click.echo("\n2. train: one sparse autoencoder on all layers")
    train(to_train)
    click.echo("\n3. analyze: tables, figures and a page")
    analysis = analyze(to_analyze)
    click.echo(f"\n{render(analysis)}")
    return analysis


def render(analysis: Analysis) -> str:
    """The table by layer, and where the figures and the page are."""
    active = _active_by_layer(analysis)
    num_latents = len(analysis.latents)
    lines = ["layer     FVU  delta CE    L0  latents dead at the layer"]
    for row in analysis.layers.to_pylist():
        delta = "" if row["delta_ce"] is None else f"{row['delta_ce']:.3f}"
        dead = num_latents - active[row["layer"]]
        lines.append(
            f"{row['layer']:5d}  {row['fvu']:6.4f}  {delta:>8}  {row['l0']:4.1f}  "
            f"{format_count(dead)} of {format_count(num_latents)} ({dead / num_latents:.1%})"
        )
    dead_everywhere = counted(analysis.summary["overall"]["num_dead"], "latent")
    lines.append(
        f"held-out sequences; FVU 0 is perfect; delta CE in nats a token; {dead_everywhere} "
        "dead at every layer"
    )
    if figures := [analysis.path / name for name in analysis.summary["figures"]]:
        shown = [figure.name for figure in figures if figure.suffix == ".png"]
        lines.append(f"figures in {figures[0].parent}: {', '.join(shown)}")
    lines.append(f"all of it on one page, to open in a browser: {analysis.page}")
    return "\n".join(lines)


def _active_by_layer(analysis: Analysis) -> dict[int, int]:
    """Layer → number of latents that some row of the layer uses."""
    table = analysis.latent_layers
    used = (
        table.filter(pc.greater(table["count"], 0)).group_by("layer").aggregate([([], "count_all")])
    )
    return dict(zip(used["layer"].to_pylist(), used["count_all"].to_pylist(), strict=True))
