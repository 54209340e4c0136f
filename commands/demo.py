"""The command `mlsae demo`."""

from pathlib import Path

import click

from mlsae.base.machine.heap import keep_freed_memory
from mlsae.commands.options import DIRECTORY


@click.command()
@click.option(
    "--out",
    default="demo-run",
    type=DIRECTORY,
    help="Directory for the store, the SAE and the analysis.",
)
def demo(out: Path) -> None:
    """Harvest, train and analyze the transformer that comes with the package."""
    from mlsae.demo import run

    # Each pass and step would otherwise ask the system for all its pages anew.
    keep_freed_memory()
    run(out)
