"""The command `mlsae import`."""

from pathlib import Path

import click

from mlsae.commands.options import DIRECTORY, LAYERS


@click.command("import")
@click.argument("source", metavar="SRC")
@click.argument("out", type=DIRECTORY)
@click.option("--site", help="Site it was trained on, where its files do not say.")
@click.option("--layers", type=LAYERS, help="Its layers, such as 0-5, where its files do not say.")
def import_(source: str, out: Path, site: str | None, layers: tuple[int, ...] | None) -> None:
    """Read an SAE of another tool from SRC, a directory or hub id."""
    from mlsae.sae.formats.convert import format_imported, import_sae

    click.echo(format_imported(import_sae(source, out, site=site, layers=layers), out))
