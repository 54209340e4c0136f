"""The command `mlsae store rm`."""

import click

from mlsae.commands.options import LOCATION


@click.command()
@click.argument("directory", type=LOCATION)
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(directory: str, yes: bool) -> None:
    """Remove a store, and nothing but a store."""
    from mlsae.store.tools.remove import find_removable, remove

    found = find_removable(directory)
    if not yes:
        click.confirm(f"remove {found.description}?", abort=True)
    remove(found)
    click.echo(f"removed {found.description}")
