"""The command `mlsae store info`."""

import json

import click

from mlsae.commands.options import LOCATION


@click.command()
@click.argument("location", type=LOCATION)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(location: str, as_json: bool) -> None:
    """Print a store's model, text, layers, rows and encoding."""
    from mlsae.store.tools.info import store_info

    found = store_info(location)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else str(found))
