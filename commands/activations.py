"""The command `mlsae activations`."""

from typing import Any

import click

from mlsae.commands.options import COUNT, DIRECTORY, reads_stores


@click.command()
@reads_stores
@click.option("--sae", required=True, type=DIRECTORY, help="Directory of a trained SAE.")
@click.option("--out", required=True, type=DIRECTORY, help="Directory of the events.")
@click.option("--rows", default="validation", help="validation, train or all.")
@click.option("--max-tokens", type=COUNT, help="Most tokens to cover; all of --rows if not given.")
@click.option("--batch-size", type=COUNT, default=4096, help="Rows encoded at once.")
@click.option(
    "--part-events", type=COUNT, default=2**22, help="Most events of a file, sorted in memory."
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, or auto.")
def activations(**settings: Any) -> None:
    """Write every active latent of every row as a Parquet data set.

    Run again it goes on where it was stopped; torchrun or accelerate launch start several processes
    on one --out.
    """
    from mlsae.analyze import ActivationsConfig, run_activations

    run_activations(ActivationsConfig(**settings))
