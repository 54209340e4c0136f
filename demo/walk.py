"""The whole path on the embedded model and text: harvest, train, analyze, in a few minutes."""

from pathlib import Path

from mlsae.analyze import Analysis, AnalyzeConfig
from mlsae.analyze import run as analyze
from mlsae.base.output.console import say
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
            epochs=4,
            resume=True,
        ),
        AnalyzeConfig(cache=out / STORE, sae=out / SAE, out=out / ANALYSIS),
    )


def walk(to_harvest: HarvestConfig, to_train: TrainConfig, to_analyze: AnalyzeConfig) -> Analysis:
    """Harvest, train and analyze, and end with a table by layer and the page's path.

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
    say(f"1. harvest: activations of {to_harvest.model}")
    harvest(to_harvest)
    say("\n2. train: one sparse autoencoder on all layers")
    train(to_train)
    say("\n3. analyze: tables, figures and a page")
    return analyze(to_analyze)
