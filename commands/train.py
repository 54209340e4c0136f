"""The command `mlsae train`."""

from pathlib import Path
from typing import Any

import click

from mlsae.base.errors import InputError
from mlsae.base.machine.heap import keep_freed_memory
from mlsae.commands.options import BYTES, COUNT, DIRECTORY, NUMBERS, Parsed, reads_stores, swept


def _training_layers(text: str) -> Any:
    from mlsae.train.options import parse_training_layers

    return parse_training_layers(text)


def _use_run_file(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    """Take the defaults of a command's options from a YAML file."""
    if path is None:
        return
    from mlsae.train.options import read_run_file

    names = {
        str(option.name): isinstance(option, click.Option) and option.multiple
        for option in ctx.command.params
        if option.expose_value
    }
    try:
        ctx.default_map = read_run_file(path, names)
    except InputError as error:
        raise click.UsageError(str(error), ctx) from None


@click.command()
@reads_stores
@click.option(
    "--config",
    "run_file",
    type=click.Path(path_type=Path, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_use_run_file,
    help="YAML file of these options, such as a run's run.yaml; what is given here comes first.",
)
@click.option("--out", required=True, type=DIRECTORY, help="Directory of the SAE, or of several.")
@click.option("--site", help="Site to train on; needed where the store holds several.")
@click.option(
    "--layers",
    type=Parsed("layers", _training_layers),
    help="Layers to train on, such as 0-5; all if not given; `each` adds an SAE for each layer.",
)
@swept("--expansion-factor", "-R", one=COUNT, what="Latents a channel; 64 if not given.")
@swept("--num-latents", one=COUNT, what="Latents, instead of an expansion factor.")
@swept("-k", "--k", one=COUNT, what="Active latents a row; 32 if not given.")
@click.option("--preset", help="paper: the step of the published multi-layer SAEs.")
@swept("--architecture", what="topk (if not given) or relu.")
@swept("--l1", one=click.FLOAT, what="Weight of relu's penalty.")
@swept(
    "--l1-warmup",
    one=click.FLOAT,
    what="First share of the steps over which --l1 rises; 0.05 if not given.",
)
@swept(
    "--resample-every",
    one=COUNT,
    what="Steps after which relu's dead latents are drawn anew; 0 for never, an eighth of all if "
    "not given.",
)
@swept("--normalize", what="standardize (if not given), none, scale or center.")
@swept("--layer-scale", what="none (if not given), log, sqrt or linear, with --normalize none.")
@click.option("--layer-weights", type=NUMBERS, help="Weight of each layer in the loss, as 1,1,2.")
@click.option("--layer-l1", type=NUMBERS, help="What --l1 is multiplied by at each layer.")
@click.option("--batch-size", type=COUNT, default=16384, help="Rows a step, over all layers.")
@click.option(
    "--micro-batch", type=COUNT, help="Rows of a batch in memory at once; all if not given."
)
@click.option("--epochs", type=COUNT, help="Passes over the store; 1 if not given.")
@click.option("--max-rows", type=COUNT, help="Rows to train on, such as 100M, instead of epochs.")
@swept(
    "--lr", one=click.FLOAT, what="Peak learning rate; 2e-4 / √(num_latents / 2¹⁴) if not given."
)
@swept("--schedule", what="linear (if not given), cosine or constant.")
@swept(
    "--lr-decay",
    one=click.FLOAT,
    what="Last share of the steps that decays to 0; 0.2, or all after the warm-up for cosine.",
)
@swept(
    "--warmup", one=click.FLOAT, what="First share of the steps that warms up; 0.01 if not given."
)
@click.option("--clip-grad-norm", type=float, help="Largest norm of a gradient; any if not given.")
@click.option(
    "--validation-fraction", type=float, default=0.01, help="Share of held-out sequences."
)
@click.option("--skip-positions", type=COUNT, default=1, help="First positions left out, 0 to 16.")
@swept("--loss-space", what="standardized (if not given) or raw.")
@click.option("--window", type=BYTES, help="Memory of the shuffling window, such as 1GiB.")
@swept("--seed", one=click.INT, what="Seed of the weights; 0 if not given.")
@click.option(
    "--data-seed", type=int, help="Seed of the order and the split; the first --seed if not given."
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, or auto.")
@swept("--precision", what="float32 (if not given) or bfloat16.")
@click.option(
    "--distribute", default="rows", help="What several processes share: rows of a batch, or saes."
)
@click.option("--resume", is_flag=True, help="Continue the run in --out from its last checkpoint.")
@click.option("--keep", type=COUNT, default=2, help="Checkpoints to keep.")
@click.option("--track", help="Send the log to tensorboard or wandb as well.")
@click.option("--checkpoint-seconds", type=float, default=300, help="Time between checkpoints.")
def train(**settings: Any) -> None:
    """Train sparse autoencoders on all layers of a store, without the transformer.

    Options that say so take several values, as in -k 16,32 or -k 16 -k 32: every combination is an
    SAE, in a directory of its own below --out, and all are trained in one pass over the store.
    """
    from mlsae.train import run_sweep
    from mlsae.train.options import make_sweep

    # Each step would otherwise ask the system for all its pages anew.
    keep_freed_memory()
    run_sweep(make_sweep(settings))
