"""The command `mlsae events`."""

from typing import Any

import click

from mlsae.commands.options import SettingsCommand


def _settings() -> type[Any]:
    from mlsae.analyze.config import EventsConfig

    return EventsConfig


@click.command(cls=SettingsCommand, settings=_settings, example="events.yaml")
def events(**settings: Any) -> None:
    """Write every active latent of every row as a Parquet data set.

    Run again it goes on where it was stopped; torchrun or accelerate launch start several processes
    on one --out.
    """
    from mlsae.analyze import EventsConfig, run_events

    run_events(EventsConfig(**settings))
