"""The command `mlsae harvest`."""

from typing import Any

import click

from mlsae.base.machine.heap import keep_freed_memory
from mlsae.commands.options import BYTES, COUNT, COUNT_OR_AUTO, DIRECTORY, LAYERS, NAMES


@click.command()
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
@click.option(
    "--attn-implementation",
    "attention_implementation",
    default="auto",
    help="Attention of the transformer: eager, sdpa, sdpa_by_blocks, …, or auto for the fastest.",
)
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
    from mlsae.base.devices import resolve_device
    from mlsae.harvest import HarvestConfig, run

    config = HarvestConfig(**settings)
    if resolve_device(config.device).type == "cpu":
        # Each forward pass would otherwise ask the system for all its pages anew.
        keep_freed_memory()
    run(config)
