"""Text and a transformer to an activation store: pack and plan first, then shard by shard."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlsae.base.devices import resolve_device
from mlsae.base.directories import held, require_outside_stores
from mlsae.base.errors import MlsaeError
from mlsae.base.interruption import (
    InterruptedWorkError,
    Interruption,
    StopNow,
    interruptible,
)
from mlsae.base.machine.resources import require_writable
from mlsae.base.output.console import Progress
from mlsae.base.ranks import Ranks, wait_until
from mlsae.base.units import counted, portion
from mlsae.harvest.compute.batches import Batches
from mlsae.harvest.compute.calibrate import calibrate
from mlsae.harvest.config import HarvestConfig
from mlsae.harvest.plan import (
    Request,
    check_vocabulary,
    layouts,
    producer_of,
    provenance_of,
    require_room,
    resolve,
    shard_bytes,
    source_of,
)
from mlsae.harvest.report import dry_run_lines, encoding_lines, last_line, layer_tables
from mlsae.harvest.shards import harvest_shards
from mlsae.harvest.text.packing import PackedText, pack
from mlsae.harvest.text.report import text_lines
from mlsae.harvest.text.sources import Source, open_sources
from mlsae.harvest.trial import try_batch
from mlsae.models import Transformer, load, outline
from mlsae.models.sites import check_sites
from mlsae.store import Calibration, PlanMismatchError, Writer, create, open_store, resume
from mlsae.store.places.objects import LocalObjects
from mlsae.store.read.commits import pending_shards
from mlsae.store.read.records import read_plan
from mlsae.store.schema import COMPLETE, SETUP
from mlsae.store.write.completion import complete
from mlsae.store.write.plan import find_plan


@dataclass(frozen=True, kw_only=True)
class HarvestResult:
    """A finished harvest."""

    path: Path
    """The store."""
    store_id: str
    """Hex identity of the store's content."""
    num_tokens: int
    """Tokens of the text; rows of each layer too, unless only some positions are kept."""
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
        The finished harvest, in every rank; None after a dry run.

    Raises:
        InputError: model, text or settings are not usable or do not fit together; a store of
            another plan is at `out`; activations are not finite.
        ResourceError: too little disk or memory, the directory cannot be written, or the device is
            absent.
        InterruptedWorkError: SIGINT or SIGTERM came; committed shards stay.
    """
    with interruptible() as interruption:
        try:
            return _run(config, interruption)
        except StopNow:
            raise _stopped(config, interruption) from None


def _run(config: HarvestConfig, interruption: Interruption) -> HarvestResult | None:
    began = time.monotonic()
    ranks = Ranks.from_environment()
    device = resolve_device(config.device)
    require_outside_stores(config.out, "--out")
    find_plan(config.out)
    if not config.dry_run:
        require_writable(config.out, "--out")
    model = outline(
        config.model,
        revision=config.revision,
        blocks=config.blocks,
        tokenizer=config.tokenizer,
    )
    request = resolve(config, model, device.type)
    if config.dry_run:
        if ranks.is_first:
            packed = _pack_and_check_room(request, model, open_sources(config), ranks)
            _say_dry_run(request, model, packed, ranks)
        return None
    # Processes share it, in one run or in several of one plan: their bytes are equal.
    with held(config.out, shared=True):
        writer = _fill(request, model, ranks, interruption)
    store = open_store(config.out)
    seconds = time.monotonic() - began
    for line in (*layer_tables(store), *encoding_lines(store)) if ranks.is_first else ():
        ranks.say(line)
    ranks.say(last_line(store, _bytes_in(config.out), seconds))
    return HarvestResult(
        path=config.out,
        store_id=store.store_id,
        num_tokens=store.num_tokens,
        layers=store.layers,
        bytes_written=writer.bytes_written,
        seconds=seconds,
    )


def _loaded(config: HarvestConfig, model: Transformer) -> Transformer:
    """Load the weights of an outlined model."""
    return load(
        model.name,
        revision=model.revision,
        dtype=config.model_dtype,
        device=resolve_device(config.device),
        attention_implementation=config.attention_implementation,
        init=config.init,
        init_seed=config.init_seed,
        blocks=config.blocks,
        device_map=config.device_map,
        tokenizer=config.tokenizer,
    )


def _fill(request: Request, model: Transformer, ranks: Ranks, interruption: Interruption) -> Writer:
    """Pack the text and harvest it, until the store is complete."""
    config = request.config
    # Paths and model are refused before a long text is packed for nothing.
    sources = open_sources(config) if ranks.is_first else ()
    with Progress("load the model", None, "", shown=ranks.is_first):
        model = _loaded(config, model)
        check_sites(model, request.sites)
    for note in model.notes:
        ranks.say(note)
    batches = None
    if not ranks.is_first:
        writer = _join(config, model, ranks)
    else:
        packed = _pack_and_check_room(request, model, sources, ranks)
        with Progress("prepare the store", None, ""):
            writer, batches = _begin(request, model, packed, ranks)
        if request.batch_is_free:
            ranks.say(f"sequences a forward pass: {batches.batch_sequences}")
        del packed
    with writer:
        harvest_shards(model, writer, batches, ranks, interruption)
    if interruption.requested:
        raise _stopped(config, interruption)
    _await_others(writer, ranks)
    return writer


def _say_dry_run(request: Request, model: Transformer, packed: PackedText, ranks: Ranks) -> None:
    """Try a batch where the model is, and describe the store and the time that it takes."""
    config, trial, seconds = request.config, None, None
    try:
        with Progress("try a batch", None, ""):
            trial = try_batch(request, _loaded(config, model), packed)
        num_batches = -(-len(packed.tokens) // request.context_length // trial.num_sequences)
        seconds = trial.seconds() * num_batches / ranks.world_size
        request = replace(request, batch_sequences=trial.batches.batch_sequences)
    except MlsaeError as error:
        ranks.say(f"not tried: {error}")
    chosen = config.sized_as if trial is None else trial.preset.name
    sizes = layouts(request, packed, model.d_model)
    for line in dry_run_lines(request, packed, sizes, chosen, seconds, model):
        ranks.say(line)
    require_room(config, sizes[config.sized_as], len(packed.tokens))


def _pack_and_check_room(
    request: Request, model: Transformer, sources: Sequence[Source], ranks: Ranks
) -> PackedText:
    """Tokens of the text, for rank 0; other ranks read them from the store."""
    config = request.config
    with Progress("pack", config.max_tokens, "token") as progress:
        packed = pack(
            sources,
            model.tokenizer,
            context_length=request.context_length,
            max_tokens=config.max_tokens,
            packing=config.packing,
            bos=config.bos,
            isolate_documents=config.isolate_documents,
            spool=config.out,
            report=progress.update,
        )
    check_vocabulary(packed, model)
    for line in text_lines(packed):
        ranks.say(line)
    if not config.dry_run:
        sizes = layouts(request, packed, model.d_model)
        require_room(config, sizes[config.sized_as], len(packed.tokens))
    return packed


def _begin(
    request: Request, model: Transformer, packed: PackedText, ranks: Ranks
) -> tuple[Writer, Batches]:
    """Try one batch, then fix the plan and write the tokens, unless they are there already."""
    config = request.config
    trial = try_batch(request, model, packed)
    batches, preset, sites = trial.batches, trial.preset, trial.sites
    calibration = None
    if preset.encoding == "int8":
        calibration = _written_calibration(config.out) or calibrate(
            model, batches, packed.token_flags, request.layers, sites
        )
    writer = create(
        config.out,
        tokens=packed.tokens,
        documents=packed.documents,
        token_flags=packed.token_flags,
        context_length=request.context_length,
        layers=request.layers,
        d_model=model.d_model,
        sites=sites,
        encoding=preset.encoding,
        compression=preset.compression,
        calibration=calibration,
        max_added_fvu=config.max_encoding_fvu,
        batch_sequences=batches.batch_sequences,
        keep_positions=config.keep_positions,
        keep_seed=config.keep_seed,
        shard_bytes=shard_bytes(request, len(packed.tokens), model.d_model, preset.encoding),
        source=source_of(model, packed),
        provenance=provenance_of(config, packed, model, ranks),
        producer=producer_of(model),
        allow_mixed=config.allow_mixed_hardware,
        cached=keeps_cached(model),
    )
    return writer, batches


def keeps_cached(model: Transformer) -> bool:
    """True where the store's files stay in the page cache.

    Filling it takes the cores' time, which a forward pass on the CPU has a use for. Training there
    takes a hundredth of the bytes that a disk can read, but a GPU is faster than many disks.
    """
    return model.device.type != "cpu"


def _written_calibration(path: Path) -> Calibration | None:
    """Calibration of a store whose tokens are written: the plan goes on wherever the harvest is
    continued, although another device would find other last bits."""
    return open_store(path, incomplete=True).calibration if (path / SETUP).exists() else None


def _join(config: HarvestConfig, model: Transformer, ranks: Ranks) -> Writer:
    """Wait for rank 0's plan and tokens, and take part if they are of this very model."""
    ranks.await_first((config.out / SETUP).exists, f"to make the plan at {config.out}")
    writer = resume(
        config.out,
        producer=producer_of(model),
        allow_mixed=config.allow_mixed_hardware,
        max_added_fvu=config.max_encoding_fvu,
        cached=keeps_cached(model),
    )
    planned, found = writer.plan.source.get("model"), model.describe()
    if planned != found:
        attention = None if planned is None else planned["attention_implementation"]
        if planned == {**found, "attention_implementation": attention}:
            raise PlanMismatchError(
                f"rank {ranks.rank} computes attention by {found['attention_implementation']}, the "
                f"plan at {config.out} by {attention}; start every rank with "
                f"--attn-implementation {attention}"
            )
        raise PlanMismatchError(
            f"rank {ranks.rank} runs another model than the plan at {config.out} names; start "
            "every rank with the same command"
        )
    return writer


def _await_others(writer: Writer, ranks: Ranks) -> None:
    """Wait until every shard is there; any rank that sees it completes the store."""
    if (writer.path / COMPLETE).exists():
        return
    if others := writer.pending():
        ranks.say(
            f"waiting for {counted(len(others), 'shard')} of other ranks; if one of them has died, "
            "stop this and run the same command again"
        )
        with Progress("wait for other ranks", None, "", shown=ranks.is_first):
            wait_until(lambda: not writer.pending())
    complete(writer.path, writer.plan)


def _stopped(config: HarvestConfig, interruption: Interruption) -> InterruptedWorkError:
    """Say in one line how much is safe and how to go on."""
    assert interruption.signal_number is not None
    if not (config.out / SETUP).exists():
        line = "stopped before anything was harvested; run the same command to begin again"
    else:
        objects = LocalObjects(config.out)
        plan = read_plan(objects)
        total = plan.num_shards
        done = total - len(pending_shards(objects, plan))
        line = (
            f"stopped: {portion(done, total, 'shard')} safe in {config.out}; run "
            "the same command to go on"
        )
    return InterruptedWorkError(line, interruption.signal_number)


def _bytes_in(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
