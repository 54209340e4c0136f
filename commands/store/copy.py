"""The command `mlsae store copy`."""

from typing import Any

import click

from mlsae.commands.options import LAYERS, LOCATION, NAMES, ROWS


@click.command()
@click.argument("source", metavar="SRC", type=LOCATION)
@click.argument("target", metavar="DST", type=LOCATION)
@click.option("--layers", type=LAYERS, help="Layers to keep, such as 0-5; all if not given.")
@click.option("--sites", type=NAMES, help="Sites to keep; all if not given.")
@click.option("--rows", type=ROWS, help="Rows to keep, N or START:STOP; whole sequences.")
@click.option(
    "--encoding",
    help="Encoding of the copy, as for harvest, such as int8; that of SRC if not given.",
)
@click.option(
    "--max-encoding-fvu", type=float, default=1e-3, help="Most FVU that the encoding may add."
)
def copy(**settings: Any) -> None:
    """Copy a store: every byte of it, or some of it, or in another encoding."""
    from mlsae.store.copying.copy import CopyConfig, copy

    done = copy(CopyConfig(**settings), progress=True)
    for note in done.notes:
        click.echo(note, err=True)
    click.echo(done.line)
