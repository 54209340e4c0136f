"""The command `mlsae import`."""

from pathlib import Path

import click

from mlsae.commands.options import DIRECTORY, LAYERS, TEXT


@click.command("import")
@click.argument("source", metavar="SRC", type=TEXT)
@click.argument("out", type=DIRECTORY)
@click.option("--site", help="Site that the SAE was trained on, where the files do not say.")
@click.option(
    "--layers", type=LAYERS, help="The SAE's layers, such as 0-5, where the files do not say."
)
def import_(source: str, out: Path, site: str | None, layers: tuple[int, ...] | None) -> None:
    """Read another tool's SAE from SRC, a directory or hub id, into the directory OUT."""
    from mlsae.sae.formats.convert import format_imported, import_sae

    click.echo(format_imported(import_sae(source, out, site=site, layers=layers), out))
