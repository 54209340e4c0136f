"""The command `mlsae export`."""

from pathlib import Path

import click

from mlsae.commands.options import DIRECTORY, TEXT


@click.command()
@click.argument("run", metavar="RUN", type=TEXT)
@click.argument("out", type=DIRECTORY)
@click.option(
    "--to",
    required=True,
    help="Format: saelens, sparsify, dictionary-learning, gemma-scope, llamascopium or mlsae.",
)
@click.option(
    "--model",
    help="Transformer name, for formats that record it. [default: the recorded one]",
)
def export(run: str, to: str, out: Path, model: str | None) -> None:
    """Write the SAE in RUN, a directory or hub id, to OUT in another tool's format."""
    from mlsae.sae.formats.convert import export_sae

    for directory in export_sae(run, to, out, model=model):
        click.echo(f"SAE for {to}: {directory}")
