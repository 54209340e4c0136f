"""Text and a transformer to an activation store: pack and plan first, then shard by shard."""

import time
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from mlsae.base.devices import resolve_device
from mlsae.base.units import format_bytes, format_count
from mlsae.harvest.config import HarvestConfig
from mlsae.harvest.forward import choose_encoding, preflight, stored_activations
from mlsae.harvest.packing import PackedText, pack
from mlsae.harvest.plan import (
    SITE,
    check_vocabulary,
    choose_context_length,
    choose_layers,
    layouts,
    provenance_of,
    require_room,
    source_of,
)
from mlsae.harvest.ranks import Ranks, wait_until
from mlsae.harvest.report import dry_run_lines, layer_table
from mlsae.harvest.text import TextConfig, open_sources
from mlsae.harvest.text_report import text_lines
from mlsae.models import Transformer, load, outline
from mlsae.store import PlanMismatchError, Writer, create, open_store, resume
from mlsae.store.plan import find_plan
from mlsae.store.schema import SETUP


@dataclass(frozen=True, kw_only=True)
class HarvestResult:
    """A finished harvest."""

    path: Path
    """The store."""
    store_id: str
    """Hex identity of the store's content."""
    num_tokens: int
    """Tokens, which are rows of each layer."""
    layers: tuple[int, ...]
    """Stored layers."""
    bytes_written: int
    """Bytes of activations that this process wrote; 0 where the store was complete before."""
    seconds: float
    """Wall-clock time of the whole run."""


def run(config: HarvestConfig) -> HarvestResult | None:
    """Harvest, or continue a harvest of the same plan that was interrupted.

    Under torchrun or accelerate launch every rank calls this; rank 0 packs, plans and prints, and
    rank r of w computes the shards r, r + w, …

    Returns:
        What was made, in every rank; None after a dry run.

    Raises:
        InputError: model, text or settings are not usable or do not fit together; a store of
            another plan is at `out`; activations are not finite.
        ResourceError: too little disk or memory, or the device is absent.
    """
    began = time.monotonic()
    ranks = Ranks.from_environment()
    device = resolve_device(config.device)
    find_plan(config.out)
    model = outline(config.model, revision=config.revision)
    context_length = choose_context_length(config.context_length, model)
    layers = choose_layers(config.layers, model)
    packed = _pack_and_check_room(config, model, context_length, layers, ranks)
    if config.dry_run:
        return None
    model = load(model.name, revision=model.revision, dtype=config.model_dtype, device=device)
    if packed is None:
        writer = _join(config, model, ranks)
    else:
        writer = _begin(config, model, packed, layers, ranks)
    with writer:
        _harvest_shards(model, writer, ranks)
        if others := writer.pending():
            ranks.say(
                f"waiting for {len(others)} shards of other ranks; if one of them has died, stop "
                "this and run the same command again"
            )
            wait_until(lambda: not writer.pending())
    store = open_store(config.out)
    seconds = time.monotonic() - began
    for line in layer_table(store):
        ranks.say(line)
    ranks.say(
        f"harvested {format_count(store.num_tokens)} tokens from {len(layers)} layers in "
        f"{seconds:.1f} s to {config.out}: {format_bytes(_bytes_in(config.out))}, "
        f"store_id {store.store_id[:12]}"
    )
    return HarvestResult(
        path=config.out,
        store_id=store.store_id,
        num_tokens=store.num_tokens,
        layers=store.layers,
        bytes_written=writer.bytes_written,
        seconds=seconds,
    )


def _pack_and_check_room(
    config: HarvestConfig,
    model: Transformer,
    context_length: int,
    layers: tuple[int, ...],
    ranks: Ranks,
) -> PackedText | None:
    """The text as tokens, in rank 0; None in the others, which read it from the store."""
    if not ranks.is_first:
        return None
    sources = open_sources(
        TextConfig(datasets=(config.dataset,), split=config.split, text_column=config.text_column)
    )
    with tqdm(
        desc="pack", total=config.max_tokens, unit="tok", unit_scale=True, disable=None
    ) as bar:
        packed = pack(
            sources,
            model.tokenizer,
            context_length=context_length,
            max_tokens=config.max_tokens,
            spool=config.out,
            report=bar.update,
        )
    check_vocabulary(packed, model)
    for line in text_lines(packed):
        ranks.say(line)
    sizes = layouts(config, packed, layers, model.d_model)
    if config.dry_run:
        for line in dry_run_lines(config, packed, sizes, model.tokenizer):
            ranks.say(line)
    # Until activations are seen, `auto` is either of two encodings of the same size.
    size = sizes["float32" if config.encoding == "float32" else "float16"]
    require_room(config, size, len(packed.tokens))
    return packed


def _begin(
    config: HarvestConfig,
    model: Transformer,
    packed: PackedText,
    layers: tuple[int, ...],
    ranks: Ranks,
) -> Writer:
    """Try one batch, then fix the plan and write the tokens; what is there already is kept."""
    sequences = packed.tokens.reshape(-1, packed.context_length)
    largest = preflight(model, sequences[: config.batch_size], layers, config.batch_size)
    return create(
        config.out,
        tokens=packed.tokens,
        documents=packed.documents,
        token_flags=packed.token_flags,
        context_length=packed.context_length,
        layers=layers,
        d_model=model.d_model,
        sites=(SITE,),
        encoding=choose_encoding(config.encoding, model.dtype, largest),
        batch_sequences=config.batch_size,
        shard_bytes=config.shard_bytes,
        source=source_of(model, packed.joints),
        provenance=provenance_of(config, packed, model, ranks),
    )


def _join(config: HarvestConfig, model: Transformer, ranks: Ranks) -> Writer:
    """Wait for rank 0's plan and tokens, and take part if they are of this very model."""
    wait_until((config.out / SETUP).exists)
    writer = resume(config.out)
    planned = writer.plan["source"].get("model")
    if planned != model.describe():
        raise PlanMismatchError(
            f"rank {ranks.rank} runs another model than the plan at {config.out} names; start "
            "every rank with the same command"
        )
    return writer


def _harvest_shards(model: Transformer, writer: Writer, ranks: Ranks) -> None:
    """Compute this rank's shards, in order; each is committed when it is full."""
    plan = writer.plan
    context_length, batch = plan["context_length"], plan["batch_sequences"]
    pending = writer.pending()
    if len(pending) < writer.num_shards:
        ranks.say(
            f"going on: {writer.num_shards - len(pending)} of {writer.num_shards} shards are there"
        )
    shards = ranks.own(pending)
    tokens = open_store(writer.path, incomplete=True).tokens
    total = sum(len(writer.shard_range(shard)) for shard in shards)
    hidden = None if ranks.is_first else True
    with tqdm(desc="harvest", total=total, unit="tok", unit_scale=True, disable=hidden) as bar:
        for shard in shards:
            writer.seek(shard)
            rows = writer.shard_range(shard)
            for start in range(rows.start, rows.stop, batch * context_length):
                stop = min(start + batch * context_length, rows.stop)
                stored = stored_activations(
                    model,
                    tokens(start, stop).reshape(-1, context_length),
                    plan["layers"],
                    plan["encoding"],
                    batch,
                )
                writer.append({(SITE, layer): values for layer, values in stored.items()})
                bar.update(stop - start)
            bar.set_postfix_str(f"{format_bytes(writer.bytes_written)} written")


def _bytes_in(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
