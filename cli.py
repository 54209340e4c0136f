"""The command line: parse, call the library, print.

Everything heavy is imported inside its command, so that help is quick and `mlsae train` never loads
transformers.
"""

import json
import os
from pathlib import Path
from typing import Any

import click

from mlsae import __version__
from mlsae.base.errors import InputError, MlsaeError
from mlsae.base.interruption import InterruptedWorkError
from mlsae.base.options import (
    BYTES,
    CONTEXT,
    COUNT,
    COUNT_OR_AUTO,
    DIRECTORY,
    LAYERS,
    LOCATION,
    NAMES,
    NUMBERS,
    ROWS,
    Parsed,
    reads_stores,
    swept,
)


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


class _OneLineErrors(click.Group):
    """A group that turns errors meant for the user into one line and exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InterruptedWorkError as stop:
            # What the user asked for is no error.
            click.echo(str(stop), err=True)
            ctx.exit(stop.exit_status)
        except MlsaeError as error:
            raise click.ClickException(" ".join(str(error).split())) from None
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            raise click.ClickException(f"{error.strerror or error}{where}") from None


@click.group(cls=_OneLineErrors, context_settings={"show_default": True})
@click.version_option(__version__, prog_name="mlsae")
def main() -> None:
    """Multi-layer sparse autoencoders: harvest once, train and analyze from the store."""
    # torch's threads wait for one another by spinning, for milliseconds. Where another program has
    # one of the cores that made training 20 times slower; a short spin costs 5% where none has.
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "5000"


@main.command()
@click.option("--model", required=True, help="Hub id or local directory of a transformer.")
@click.option(
    "--dataset",
    required=True,
    multiple=True,
    help="Hub id, directory or file of text; NAME:SHARE, given again, for a mixture.",
)
@click.option("--out", required=True, type=DIRECTORY, help="Directory of the activation store.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option(
    "--init",
    default="trained",
    help="trained, rerandomized, rerandomized-keep-embeddings, random or control.",
)
@click.option("--init-seed", type=int, default=0, help="Seed of what --init draws.")
@click.option("--blocks", help="Path of the module list of the blocks, such as transformer.h.")
@click.option("--split", default="train", help="Split of a hub data set.")
@click.option("--subset", help="Subset (configuration) of a hub data set.")
@click.option("--shuffle-seed", type=int, help="Shuffle documents as they are read.")
@click.option("--text-column", default="text", help="Column that holds the text.")
@click.option("--tokens-column", help="Column of token ids, instead of text.")
@click.option("--max-tokens", type=COUNT, help="Most tokens, such as 10M; all if not given.")
@click.option("--max-disk", type=BYTES, help="Most bytes the store may take, such as 200GB.")
@click.option(
    "--context-length",
    type=COUNT,
    help="Tokens a sequence; the model's, at most 1,024, if not given.",
)
@click.option(
    "--packing", default="concatenate", help="concatenate, or document: one a sequence, padded."
)
@click.option("--bos", default="auto", help="auto, always or never: whether BOS opens a context.")
@click.option(
    "--isolate-documents", is_flag=True, help="Attention and positions stay inside documents."
)
@click.option(
    "--layers", type=LAYERS, help="Blocks from 0, such as 0-5 or 0,2,4; all if not given."
)
@click.option(
    "--sites",
    type=NAMES,
    default="resid_post",
    help="Of resid_pre,resid_mid,resid_post,attn_out,mlp_out.",
)
@click.option(
    "--keep-positions", type=COUNT, help="Positions a sequence that are stored, chosen at random."
)
@click.option("--keep-seed", type=int, default=0, help="Seed of that choice.")
@click.option("--encoding", default="auto", help="auto, or one of those above; auto takes 16 bits.")
@click.option(
    "--max-encoding-fvu", type=float, default=1e-3, help="Most FVU that the encoding may add."
)
@click.option("--model-dtype", default="auto", help="Precision the transformer runs in.")
@click.option("--attn-implementation", "attention_implementation", help="eager, sdpa, …")
@click.option(
    "--batch-size", type=COUNT_OR_AUTO, default="auto", help="Sequences a forward pass, or auto."
)
@click.option(
    "--shard-size", type=BYTES, help="Bytes of one file of one layer; 128MiB if not given."
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, or auto.")
@click.option("--device-map", help="auto: spread a large model over GPUs, memory and disk.")
@click.option(
    "--allow-mixed-hardware", is_flag=True, help="Continue what other hardware has begun."
)
@click.option("--dry-run", is_flag=True, help="Say what would be harvested; write nothing.")
def harvest(**settings: Any) -> None:
    """Run a transformer over text once and store the activations of its layers.

    \b
    --encoding     bytes an activation, FVU added, CPU time to read (stories260k)
    auto           bfloat16 for a model in bfloat16, else float16
    float16        2.00  6e-8  1     magnitudes up to 65,504
    bfloat16       2.00  4e-6  0.7   any magnitude
    float32        4.00  0     1     what the model computed
    int8           1.02  4e-5  1.7   half the disk
    float16-zstd   1.85  6e-8  3.1   less to send, slower to read
    bfloat16-zstd  1.51  4e-6  3.5   the same
    float32-zstd   3.54  0     5.2   the same
    int8-zstd      0.96  4e-5  4.1   the least to send
    """
    from mlsae.harvest import HarvestConfig, run

    run(HarvestConfig(**settings))


@main.command()
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

    run_sweep(make_sweep(settings))


@main.command()
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


@main.command()
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


@main.command()
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
    from mlsae.analyze.results.listing import list_latents

    names = None if columns is None else [name.strip() for name in columns.split(",")]
    click.echo(list_latents(columns=names, **settings))


@main.command("examples")
@click.argument("analysis", type=DIRECTORY)
@click.argument("latent", type=int)
@click.option("--layer", type=int, help="Of this layer alone.")
@click.option("--limit", type=COUNT, help="Most of each list; all that there are if not given.")
def examples_(**settings: Any) -> None:
    """Print the examples of LATENT in ANALYSIS, each with its tokens and its values by layer."""
    from mlsae.analyze.results.examples import list_examples

    click.echo(list_examples(**settings))


@main.command("export")
@click.argument("run", metavar="RUN")
@click.argument("out", type=DIRECTORY)
@click.option(
    "--to", required=True, help="Format: saelens, sparsify, dictionary-learning or mlsae."
)
@click.option("--model", help="Name of the transformer, for the formats that record it.")
def export(run: str, to: str, out: Path, model: str | None) -> None:
    """Write the SAE of RUN, a directory or hub id, in the format of another tool."""
    from mlsae.sae.formats.convert import export_sae

    for directory in export_sae(run, to, out, model=model):
        click.echo(f"SAE for {to}: {directory}")


@main.command("import")
@click.argument("source", metavar="SRC")
@click.argument("out", type=DIRECTORY)
@click.option("--site", help="Site it was trained on, where its files do not say.")
@click.option("--layers", type=LAYERS, help="Its layers, such as 0-5, where its files do not say.")
def import_(source: str, out: Path, site: str | None, layers: tuple[int, ...] | None) -> None:
    """Read an SAE of another tool from SRC, a directory or hub id."""
    from mlsae.sae.formats.convert import format_imported, import_sae

    click.echo(format_imported(import_sae(source, out, site=site, layers=layers), out))


@main.command()
@click.option("--out", default="demo-run", type=DIRECTORY, help="Directory of everything it makes.")
def demo(out: Path) -> None:
    """Harvest, train and analyze the transformer that comes with the package."""
    from mlsae.demo import run

    run(out)


@main.group()
def store() -> None:
    """Look at an activation store, check every byte of it, copy it or remove it."""


@store.command()
@click.argument("location", type=LOCATION)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(location: str, as_json: bool) -> None:
    """Say what a store holds."""
    from mlsae.store.tools.info import format_info, store_info

    found = store_info(location)
    click.echo(json.dumps(found, indent=2) if as_json else format_info(found))


@store.command()
@click.argument("location", type=LOCATION)
def verify(location: str) -> None:
    """Check every hash, checksum, moment and rule of a store."""
    from mlsae.store import open_store
    from mlsae.store.tools.verify import verify as find_problems

    # What is kept on this machine says nothing of what the place holds now.
    report = find_problems(location, progress=True, cache_bytes=0)
    for line in (*report.problems, *report.notes):
        click.echo(line)
    if problems := len(report.problems):
        raise click.ClickException(
            f"{location} breaks {problems} rule{'s' if problems > 1 else ''} of storage_schema.md"
        )
    store_id = open_store(location, cache_bytes=0).store_id
    click.echo(f"{location} is sound: store_id {store_id}")


@store.command("copy")
@click.argument("source", metavar="SRC", type=LOCATION)
@click.argument("target", metavar="DST", type=LOCATION)
@click.option("--layers", type=LAYERS, help="Layers to keep, such as 0-5; all if not given.")
@click.option("--sites", type=NAMES, help="Sites to keep; all if not given.")
@click.option("--rows", type=ROWS, help="Rows to keep, N or START:STOP; whole sequences.")
@click.option("--encoding", help="As for harvest, such as int8; that of SRC if not given.")
@click.option(
    "--max-encoding-fvu", type=float, default=1e-3, help="Most FVU that the encoding may add."
)
def copy_store(**settings: Any) -> None:
    """Copy a store: every byte of it, or some of it, or in another encoding."""
    from mlsae.store.copying.copy import CopyConfig, copy

    done = copy(CopyConfig(**settings), progress=True)
    for note in done.notes:
        click.echo(note, err=True)
    click.echo(done.line)


@store.command()
@click.argument("directory", type=LOCATION)
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(directory: str, yes: bool) -> None:
    """Remove a store, and nothing but a store."""
    from mlsae.store.tools.remove import find_removable, remove

    found = find_removable(directory)
    if not yes:
        click.confirm(f"remove {found.description}?", abort=True)
    remove(found)
    click.echo(f"removed {found.description}")
