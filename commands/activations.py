"""The command `mlsae activations`."""

from typing import Any

import click

from mlsae.commands.options import SettingsCommand


def _settings() -> type[Any]:
    from mlsae.analyze.config import ActivationsConfig

    return ActivationsConfig


@click.command(cls=SettingsCommand, settings=_settings)
def activations(**settings: Any) -> None:
    """Write every active latent of every row as a Parquet data set.

    Run again it goes on where it was stopped; torchrun or accelerate launch start several processes
    on one --out.
    """
    from mlsae.analyze import ActivationsConfig, run_activations

    run_activations(ActivationsConfig(**settings))
