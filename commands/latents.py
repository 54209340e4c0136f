"""The command `mlsae latents`."""

from pathlib import Path
from typing import Any

import click

from mlsae.commands.options import COUNT, DIRECTORY


@click.command()
@click.argument("analysis", type=DIRECTORY)
@click.option("--where", "condition", help="Such as 'density > 1e-5 and num_layers >= 3'.")
@click.option("--sort", help="Column to sort by; -COLUMN for the largest first.")
@click.option("--limit", type=COUNT, help="Most latents; if not given 20, or with --out all.")
@click.option("--columns", help="Columns, such as latent,density; if not given some, or all.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write a Parquet file instead."
)
def latents(columns: str | None, **settings: Any) -> None:
    """Print the latents of ANALYSIS, those that a condition on their columns chooses."""
    from mlsae.analyze.results.text.listing import list_latents

    names = None if columns is None else [name.strip() for name in columns.split(",")]
    click.echo(list_latents(columns=names, **settings))
