"""The command `mlsae latents`."""

from typing import Any

import click

from mlsae.commands.options import COUNT, DIRECTORY, FILE


@click.command()
@click.argument("analysis", type=DIRECTORY)
@click.option(
    "--where",
    "condition",
    help="Condition on columns, such as 'density > 1e-5 and num_layers >= 3'. [default: none]",
)
@click.option("--sort", help="Column to sort by, -COLUMN for the largest first. [default: latent]")
@click.option("--limit", type=COUNT, help="Most latents. [default: 20, or all with --out]")
@click.option(
    "--columns",
    help="Columns, such as latent,density. [default: the most telling, or all with --out]",
)
@click.option(
    "--out",
    type=FILE,
    help="Parquet file to write, instead of printing.",
)
def latents(columns: str | None, **settings: Any) -> None:
    """Print latents in ANALYSIS, all or those that meet a condition on their columns."""
    from mlsae.analyze.results.text.listing import list_latents

    names = None if columns is None else [name.strip() for name in columns.split(",")]
    click.echo(list_latents(columns=names, **settings))
