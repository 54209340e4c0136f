"""The command `mlsae examples`."""

from typing import Any

import click

from mlsae.commands.options import COUNT, DIRECTORY


@click.command()
@click.argument("analysis", type=DIRECTORY)
@click.argument("latent", type=int)
@click.option("--layer", type=int, help="Layer to show, as the model counts it. [default: all]")
@click.option("--limit", type=COUNT, help="Most examples in each list. [default: all]")
def examples(**settings: Any) -> None:
    """Print LATENT's examples in ANALYSIS, each with its tokens and its values by layer."""
    from mlsae.analyze.results.text.examples import list_examples

    click.echo(list_examples(**settings))
