"""The command `mlsae store verify`."""

import click

from mlsae.base.errors import without_secrets
from mlsae.base.units import counted
from mlsae.commands.options import LOCATION


@click.command()
@click.argument("location", type=LOCATION)
def verify(location: str) -> None:
    """Check every hash, checksum, moment and rule in a store."""
    from mlsae.store import open_store
    from mlsae.store.tools.verify import verify as find_problems

    # Parts kept on this machine say nothing about the place itself.
    report = find_problems(location, progress=True, cache_bytes=0)
    for line in (*report.problems, *report.notes):
        click.echo(line)
    if problems := len(report.problems):
        raise click.ClickException(
            f"{without_secrets(location)} breaks {counted(problems, 'rule')} of storage_schema.md"
        )
    store_id = open_store(location, cache_bytes=0).store_id
    click.echo(f"{without_secrets(location)} is sound: store_id {store_id}")
