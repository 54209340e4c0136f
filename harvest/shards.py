"""Shard after shard through the transformer, each committed when it is full."""

import time

from mlsae.base.interruption import Interruption
from mlsae.base.output.console import Progress
from mlsae.base.ranks import Ranks
from mlsae.base.units import format_bytes, portion
from mlsae.harvest.compute.batches import Batches
from mlsae.harvest.compute.codecs import codecs_for
from mlsae.harvest.compute.forward import Computed, Forward
from mlsae.models import Transformer
from mlsae.store import Store, Writer, open_store

STOPPING = "finishing the shard in hand, then stopping; press Ctrl-C again to stop at once"


def batches_of(store: Store) -> Batches:
    """Batches of a store whose tokens are written."""
    packing = store.source["packing"]
    return Batches(
        tokens=store.tokens,
        documents=store.documents if packing["isolate_documents"] else None,
        token_flags=store.token_flags if packing["packing"] == "document" else None,
        context_length=store.context_length,
        batch_sequences=store.plan.batch_sequences,
        keep=store.plan.keep_positions,
    )


def harvest_shards(
    model: Transformer,
    writer: Writer,
    batches: Batches | None,
    ranks: Ranks,
    interruption: Interruption,
) -> None:
    """Compute this rank's pending shards, in order, until all are done or a signal asks to stop.

    Args:
        model: the loaded transformer.
        writer: writer of a store whose tokens are written.
        batches: the text, in the rank that packed it; None to read it from the store.
        ranks: this rank, which tells its shards.
        interruption: deferred until a shard is done.
    """
    pending = writer.pending()
    if len(pending) < writer.num_shards:
        there = writer.num_shards - len(pending)
        ranks.say(f"going on: {portion(there, writer.num_shards, 'shard')} there")
    shards = ranks.own(pending)
    if not shards:
        return
    store = open_store(writer.path, incomplete=True)
    per_sequence = store.rows_per_sequence
    batch_rows = store.plan.batch_sequences * per_sequence
    forward = Forward(
        model,
        layers=store.layers,
        sites=store.sites,
        codecs=codecs_for(
            store.encoding, store.sites, store.layers, store.d_model, store.calibration
        ),
        batch_rows=batch_rows,
    )
    work = _Work(store, writer, forward, batches or batches_of(store))
    row_bytes = store.row_bytes * len(store.layers) * len(store.sites)
    num_rows = sum(len(writer.shard_range(shard)) for shard in shards)
    with (
        Progress(
            "harvest",
            num_rows // per_sequence * store.context_length,
            "token",
            shown=ranks.is_first,
        ) as progress,
        interruption.deferred(STOPPING),
    ):
        began = time.monotonic()
        done_rows = 0
        for shard in shards:
            writer.seek(shard)
            rows = writer.shard_range(shard)
            for start in range(rows.start, rows.stop, batch_rows):
                stop = min(start + batch_rows, rows.stop)
                work.begin(start, stop, is_last=stop == rows.stop)
                done_rows += stop - start
                rate = done_rows * row_bytes / (time.monotonic() - began)
                left = (num_rows - done_rows) * row_bytes
                progress.note(f"{format_bytes(rate)}/s", f"{format_bytes(left)} to write")
                progress.update((stop - start) // per_sequence * store.context_length)
            if interruption.requested:
                break


class _Work:
    """Hands each batch to the writer; on a GPU one late, so that the next is being computed.

    On a CPU forward passes and writing take turns, each on all cores; only the disk is waited for
    beside the next pass.
    """

    def __init__(self, store: Store, writer: Writer, forward: Forward, batches: Batches) -> None:
        self._store, self._writer, self._forward = store, writer, forward
        self._batches = batches
        self._underway: Computed | None = None

    def begin(self, start: int, stop: int, *, is_last: bool) -> None:
        """Compute the rows from `start` to `stop`; the shard's last go to the writer at once."""
        per_sequence = self._store.rows_per_sequence
        batch = self._batches.batch(start // per_sequence, (stop - start) // per_sequence)
        groups = self._writer.row_groups(start, stop)
        before, self._underway = self._underway, None
        computed = self._forward(batch)
        if self._forward.is_on_host:
            # The writer's threads write while this one measures: two that measure would only wait
            # for each other.
            self._write(computed)
            self._forward.measure(computed, groups)
            computed.check()
        else:
            self._forward.measure(computed, groups)
            if before is not None:
                before.check()
                self._write(before)
            if is_last:
                computed.check()
                self._write(computed)
            else:
                self._underway = computed
        if is_last:
            self._writer.end_shard(self._forward.moments.take(), self._forward.cost.take())
        if self._forward.is_on_host:
            # A core that writes beside a forward pass holds up the others: they all wait for it.
            self._writer.drain()

    def _write(self, computed: Computed) -> None:
        self._writer.write(computed.stored(), moments_follow=True)
