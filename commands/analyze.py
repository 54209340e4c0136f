"""The command `mlsae analyze`."""

from typing import Any

import click

from mlsae.commands.options import SettingsCommand


def _settings() -> type[Any]:
    from mlsae.analyze.config import AnalyzeConfig

    return AnalyzeConfig


@click.command(cls=SettingsCommand, settings=_settings, example="analyze.yaml")
def analyze(**settings: Any) -> None:
    """Turn an SAE's latents into Parquet tables, figures and a page to look at them."""
    from mlsae.analyze import AnalyzeConfig, run

    run(AnalyzeConfig(**settings))
