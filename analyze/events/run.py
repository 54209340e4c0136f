"""`mlsae events`: every active latent of every row, by one process or several."""

import time
from typing import Any

import torch

from mlsae.analyze.config import EventsConfig
from mlsae.analyze.events.encode import encode_rows, write_events
from mlsae.analyze.events.plan import EventsPlan, PlannedPart, estimate_bytes, plan_events
from mlsae.analyze.pairing import pair, provenance_of
from mlsae.analyze.results.events import Events, load_events
from mlsae.analyze.results.events_directory import KIND, PLACES, EventsDirectory
from mlsae.analyze.results.records import ReadStore, RecordedPlan, describe
from mlsae.analyze.results.tables import TABLES_VERSION
from mlsae.analyze.selection import Int, choose_sequences, read_rows
from mlsae.base.devices import resolve_device
from mlsae.base.directories import held, require_outside_stores
from mlsae.base.interruption import InterruptedWorkError, Interruption, StopNow, interruptible
from mlsae.base.machine.resources import require_disk, require_writable
from mlsae.base.output.console import Progress
from mlsae.base.ranks import Ranks, wait_until
from mlsae.base.settings import deciding
from mlsae.base.units import counted, format_short, portion

STOPPING = "finishing the part in hand, then stopping; press Ctrl-C again to stop at once"


def run(config: EventsConfig) -> Events:
    """See `mlsae.analyze.run_events`."""
    with interruptible() as interruption:
        try:
            return _run(config, interruption)
        except StopNow:
            raise _stopped(config, interruption) from None


def _run(config: EventsConfig, interruption: Interruption) -> Events:
    ranks = Ranks.from_environment()
    directory = EventsDirectory(config.out)
    if ranks.is_first:
        directory.check_usable()
    require_outside_stores(config.out, "--out")
    require_writable(config.out, "--out")
    pairing = pair(
        config.cache,
        config.sae,
        resolve_device(config.device),
        cache_dir=config.cache_dir,
        cache_bytes=config.cache_size,
    )
    sequences = choose_sequences(pairing.store, config.rows, pairing.validation, config.max_tokens)
    plan = plan_events(pairing, sequences, config.part_events, provenance_of(pairing))
    content = _content(config, plan, sequences)
    # Processes share it, in one run or in several of one plan: their bytes are equal.
    with held(config.out, shared=True):
        was_complete = _fill(config, plan, content, ranks, interruption)
    found = load_events(config.out)
    if was_complete:
        ranks.say(f"{config.out} is finished and every byte of it sound: nothing to do")
    ranks.say(f"events {found.path}: {describe(found.summary['events'])}")
    return found


def _fill(
    config: EventsConfig,
    plan: EventsPlan,
    content: RecordedPlan,
    ranks: Ranks,
    interruption: Interruption,
) -> bool:
    """Write the parts that are missing; True where none was, and every byte is sound."""
    directory, paths = EventsDirectory(config.out), [part.path for part in plan.parts]
    if ranks.is_first:
        if directory.is_begun:
            directory.check_plan(content)
        _require_room(config, plan, directory)
        directory.begin(content)
    else:
        ranks.await_first(lambda: directory.is_begun, f"to begin {config.out}")
        directory.check_plan(content)
    directory.check_foreign(paths)
    pending = set(directory.pending(paths))
    was_complete = directory.is_complete and not pending
    _check(directory, [path for path in _own(paths, ranks) if path not in pending], ranks)
    if not was_complete:
        if len(pending) < len(paths):
            there = len(paths) - len(pending)
            ranks.say(f"going on: {portion(there, len(paths), 'part')} there")
        own = set(_own(paths, ranks)) & pending
        parts = [part for part in plan.parts if part.path in own]
        _write(plan, parts, directory, config, ranks, interruption)
        if interruption.requested:
            raise _stopped(config, interruption)
        _await_others(directory, paths, ranks)
    return was_complete


def _content(config: EventsConfig, plan: EventsPlan, sequences: Int) -> RecordedPlan:
    """The plan of the directory: every setting that decides its bytes, and places of inputs."""
    pairing = plan.pairing
    return RecordedPlan(
        kind=KIND,
        tables_version=TABLES_VERSION,
        **provenance_of(pairing),
        cache=tuple(member.place for member in pairing.store.stores),
        sae=str(config.sae),
        stores=tuple(
            ReadStore(store_id=member.store_id, num_sequences=member.num_sequences)
            for member in pairing.store.stores
        ),
        site=pairing.site,
        layers=pairing.layers,
        num_latents=pairing.sae.config.num_latents,
        skip_positions=pairing.skip_positions,
        context_length=pairing.store.context_length,
        rows_per_sequence=pairing.store.rows_per_sequence,
        num_sequences=len(sequences),
        num_parts=len(plan.parts),
        notes=pairing.notes,
        settings=_settings(config, pairing.device),
    )


def _settings(config: EventsConfig, device: torch.device) -> dict[str, Any]:
    """Deciding settings; hashes stand for the places `cache` and `sae`, a kind for the device."""
    names = [name for name in deciding(EventsConfig) if name not in PLACES]
    return {**{name: getattr(config, name) for name in names}, "device": device.type}


def _own(paths: list[str], ranks: Ranks) -> list[str]:
    return [paths[index] for index in ranks.own(list(range(len(paths))))]


def _require_room(config: EventsConfig, plan: EventsPlan, directory: EventsDirectory) -> None:
    """Require room on the disk for the parts that are still missing."""
    sizes = estimate_bytes(plan, config.batch_size)
    require_disk(
        config.out,
        sum(sizes[path] for path in directory.pending(sizes)),
        "the events",
        "lower --max-tokens or choose another --out",
    )


def _check(directory: EventsDirectory, paths: list[str], ranks: Ranks) -> None:
    """Check every byte of parts that are there."""
    with Progress("check", len(paths), "part", shown=ranks.is_first) as progress:
        for path in paths:
            directory.check_whole(path)
            progress.update(1)


@torch.no_grad()
def _write(
    plan: EventsPlan,
    parts: list[PlannedPart],
    directory: EventsDirectory,
    config: EventsConfig,
    ranks: Ranks,
    interruption: Interruption,
) -> None:
    """Write this rank's parts, in order, until all are there or a signal asks to stop."""
    pairing, began, num_events = plan.pairing, time.monotonic(), 0
    with (
        Progress(
            "events", sum(part.num_rows for part in parts), "row", shown=ranks.is_first
        ) as progress,
        interruption.deferred(STOPPING),
    ):
        for part in parts:
            seen = 0
            with plan.writer(directory.data, part, directory.path) as writer:
                batches = read_rows(
                    pairing.store, pairing.site, part.layer, part.sequences, config.batch_size
                )
                for batch in batches:
                    encoded = encode_rows(pairing, part.layer, batch)
                    write_events(writer, encoded, part.end_row)
                    progress.update(len(encoded.rows))
                    seen += len(encoded.rows)
            assert writer.record is not None
            directory.keep(writer.record)
            # The total counts flagged rows too, which are not read.
            progress.update(part.num_rows - seen)
            num_events += writer.record.num_events
            rate = num_events / (time.monotonic() - began)
            progress.note(f"{format_short(rate)} events/s")
            if interruption.requested:
                break


def _await_others(directory: EventsDirectory, paths: list[str], ranks: Ranks) -> None:
    """Wait until every part is there, and record that in the directory."""
    if others := directory.pending(paths):
        ranks.say(
            f"waiting for {counted(len(others), 'part')} of other ranks; if one of them has died, "
            f"stop this and run the same command again"
        )
        with Progress("wait for other ranks", None, "", shown=ranks.is_first):
            wait_until(lambda: not directory.pending(paths))
    directory.complete(paths)


def _stopped(config: EventsConfig, interruption: Interruption) -> InterruptedWorkError:
    """One line with the parts that are kept, and the way to go on."""
    assert interruption.signal_number is not None
    directory = EventsDirectory(config.out)
    line = "stopped before anything was written; run the same command to begin again"
    if directory.is_begun:
        there, total = directory.progress()
        line = (
            f"stopped: {portion(there, total, 'part')} safe in {config.out}; run "
            f"the same command to go on"
        )
    return InterruptedWorkError(line, interruption.signal_number)
