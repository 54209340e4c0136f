"""The command `mlsae train`."""

from typing import Any

import click

from mlsae.base.machine.heap import keep_freed_memory
from mlsae.commands.options import SettingsCommand


def _settings() -> type[Any]:
    from mlsae.train.config import TrainConfig

    return TrainConfig


@click.command(cls=SettingsCommand, settings=_settings, example="a run's run.yaml")
def train(**settings: Any) -> None:
    """Train sparse autoencoders on all layers of a store, without the transformer.

    Options that say "several" take several values, as in -k 16,32 or -k 16 -k 32: every combination
    is an SAE, in its own directory below --out, and one pass over the store trains all.
    """
    from mlsae.train import run_sweep
    from mlsae.train.options import make_sweep

    # Each step would otherwise ask the system for all its pages anew.
    keep_freed_memory()
    run_sweep(make_sweep(settings))
