"""The command `mlsae analyze`."""

from pathlib import Path
from typing import Any

import click

from mlsae.commands.options import CONTEXT, COUNT, DIRECTORY, reads_stores


@click.command()
@reads_stores
@click.option("--sae", required=True, type=DIRECTORY, help="Directory of a trained SAE.")
@click.option("--out", required=True, type=DIRECTORY, help="Directory of the analysis.")
@click.option("--rows", default="validation", help="validation, train or all.")
@click.option(
    "--max-tokens", type=COUNT, help="Most tokens to evaluate; all of --rows if not given."
)
@click.option("--model", type=DIRECTORY, help="Where the transformer lies now, if it was moved.")
@click.option("--batch-size", type=COUNT, default=4096, help="Rows encoded at once.")
@click.option("--examples", type=COUNT, default=16, help="Of a latent and at each layer, or 0.")
@click.option("--samples", type=COUNT, default=4, help="Random ones of a quarter of its values.")
@click.option("--context-tokens", type=CONTEXT, default="8,4", help="Before and after the peak.")
@click.option("--examples-seed", type=int, default=0, help="Seed of the random examples.")
@click.option(
    "--decomposition-max-tokens",
    type=COUNT,
    default=1_000_000,
    help="Most tokens whose layers are looked at together.",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text whose latents are written and drawn, token by token; again for more.",
)
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of such texts, one a line.",
)
@click.option(
    "--figures/--no-figures", default=True, help="Draw the figures; it takes some seconds."
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, or auto.")
@click.option("--to-delphi", type=DIRECTORY, help="Write Delphi's latent cache of the events, too.")
def analyze(**settings: Any) -> None:
    """Turn an SAE's latents into Parquet tables, figures and a page to look at them."""
    from mlsae.analyze import AnalyzeConfig, run

    run(AnalyzeConfig(**settings))
