"""The command `mlsae store copy`."""

from typing import Any

import click

from mlsae.commands.options import LOCATION, SettingsCommand


def _settings() -> type[Any]:
    from mlsae.store.copying.copy import CopyConfig

    return CopyConfig


@click.command(cls=SettingsCommand, settings=_settings)
@click.argument("source", metavar="SRC", type=LOCATION)
@click.argument("target", metavar="DST", type=LOCATION)
def copy(**settings: Any) -> None:
    """Copy a store: every byte, or parts alone, or in another encoding."""
    from mlsae.store.copying.copy import CopyConfig, copy

    done = copy(CopyConfig(**settings), progress=True)
    for note in done.notes:
        click.echo(note, err=True)
    click.echo(done.line)
