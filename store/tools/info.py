"""Summary of a store, in one screen or as JSON."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlsae.base.units import counted, format_bytes, format_count, format_ranges
from mlsae.store.errors import RemoteError
from mlsae.store.format.moments import Moments
from mlsae.store.plan import Plan
from mlsae.store.read.commits import (
    LargestAddedFVU,
    Producers,
    describe_producer,
    largest_added_fvu,
    pending_shards,
)
from mlsae.store.read.records import Producer
from mlsae.store.read.store import Store, open_store


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """Summary of a store, complete or not."""

    place: str
    """Directory or URL of the store."""
    store_id: str | None
    """The store's id; None while it is incomplete."""
    plan: Plan
    """The store's plan."""
    num_committed: int
    """Shards that are committed."""
    num_bytes: int | None
    """Bytes in all objects; None where the place does not list them."""
    added_fvu: LargestAddedFVU | None
    """Most FVU that the encoding adds to a shard; None where none was measured."""
    producers: tuple[tuple[Producer | None, int], ...]
    """Each producer, and how many of the committed shards it made."""
    provenance: tuple[dict[str, Any], ...]
    """Records about the runs that wrote the store, oldest first."""
    moments: Mapping[str, Moments] | None
    """Site → moments over the eligible rows; None while the store is incomplete."""

    @property
    def is_complete(self) -> bool:
        """True if all shards are there."""
        return self.store_id is not None

    def to_json(self) -> dict[str, Any]:
        """The summary as a JSON object."""
        info: dict[str, Any] = {
            "path": self.place,
            "complete": self.is_complete,
            "store_id": self.store_id,
            "plan_id": self.plan.id,
            "num_sequences": self.plan.num_sequences,
            "num_rows": self.plan.num_rows,
            "num_shards": self.plan.num_shards,
            "num_committed": self.num_committed,
            "num_bytes": self.num_bytes,
            "plan": self.plan.to_json(),
            "added_fvu": None if self.added_fvu is None else asdict(self.added_fvu),
            "producers": [
                {"producer": producer, "num_shards": num_shards}
                for producer, num_shards in self.producers
            ],
            "provenance": list(self.provenance),
        }
        if self.moments is not None:
            info["moments"] = {
                site: {
                    "num_rows": of_site.count,
                    "layers": list(of_site.layers),
                    "mean_norm": of_site.norm_mean.tolist(),
                    "max_abs": of_site.max_abs.tolist(),
                    "adjacent_cosine_pooled": of_site.adjacent_cosine().tolist(),
                }
                for site, of_site in self.moments.items()
            }
        return info

    def __str__(self) -> str:
        """Lines for people."""
        plan = self.plan
        state = "complete" if self.is_complete else "incomplete"
        # Producers record what they like.
        models = [run["model"] for run in self.provenance if isinstance(run.get("model"), dict)]
        model = models[-1].get("name") if models else None
        lines = [
            f"{self.place}: {state}, schema {plan.schema_version}",
            f"  model       {model if isinstance(model, str) else '(not recorded)'}",
            f"  tokens      {format_count(plan.num_tokens)} in "
            f"{counted(plan.num_sequences, 'sequence')} of {plan.context_length}",
            *_rows_line(plan),
            f"  activations {', '.join(plan.sites)}; layers {format_ranges(plan.layers)}; "
            f"d_model {plan.d_model}; {plan.preset.name}",
            *_added_line(self.added_fvu),
            f"  shards      {self.num_committed} of {plan.num_shards} committed, "
            f"{counted(plan.shard_rows, 'row')} each",
            *(
                f"  made by     {describe_producer(producer)}: {counted(num_shards, 'shard')}"
                for producer, num_shards in self.producers
            ),
            f"  on disk     {_size(self.num_bytes)}",
            f"  plan_id     {plan.id}",
            f"  store_id    {self.store_id or '(when complete)'}",
        ]
        for site, of_site in (self.moments or {}).items():
            lines += ["", _moments_table(site, of_site)]
        return "\n".join(lines)


def store_info(location: str | os.PathLike[str]) -> StoreInfo:
    """Summary of a store, complete or not.

    Args:
        location: directory or URL of the store.

    Raises:
        StoreError: there is no store, its tokens are not written, or a record is damaged.
    """
    # A few records are not worth keeping on this machine.
    store = open_store(location, incomplete=True, cache_bytes=0)
    made = Producers(store.objects, store.plan).by_shard()
    num_pending = len(pending_shards(store.objects, store.plan))
    return StoreInfo(
        place=store.place,
        store_id=store.store_id if store.is_complete else None,
        plan=store.plan,
        num_committed=store.plan.num_shards - num_pending,
        num_bytes=_num_bytes(store),
        added_fvu=largest_added_fvu(store.objects, store.plan),
        producers=tuple((producer, len(shards)) for producer, shards in made),
        provenance=_provenance(store),
        moments={site: store.moments(site) for site in store.sites} if store.is_complete else None,
    )


def _num_bytes(store: Store) -> int | None:
    try:
        return sum(size for _, size in store.objects.walk())
    except RemoteError:
        return None


def _provenance(store: Store) -> tuple[dict[str, Any], ...]:
    try:
        return tuple(store.provenance())
    except RemoteError:
        return ()


def _moments_table(site: str, moments: Moments) -> str:
    """A table by layer: mean norm, largest magnitude, pooled cosine with the next layer."""
    rows = [
        f"  {site}, {counted(moments.count, 'eligible row')} a layer "
        f"(position 0, special, padding and masked tokens left out)",
        f"  {'layer':>5} {'mean norm':>10} {'max |x|':>10} {'cosine to next':>15}",
    ]
    cosines = [*moments.adjacent_cosine().tolist(), None]
    for layer, norm, largest, cosine in zip(
        moments.layers, moments.norm_mean, moments.max_abs, cosines, strict=True
    ):
        last = "" if cosine is None else f"{cosine:.3f}"
        rows.append(f"  {layer:>5} {norm:>10.4g} {largest:>10.4g} {last:>15}")
    return "\n".join(rows)


def _size(num_bytes: int | None) -> str:
    return "(the server does not list it)" if num_bytes is None else format_bytes(num_bytes)


def _added_line(added: LargestAddedFVU | None) -> list[str]:
    if added is None:
        return []
    decile = "" if added.decile is None else f"; {added.decile:.2g} in a decile of row norm"
    return [
        f"  added FVU   {added.total:.2g} at most, in shard {added.shard} (layer {added.layer}, "
        f"{added.site}){decile}"
    ]


def _rows_line(plan: Plan) -> list[str]:
    keep = plan.keep_positions
    if keep is None:
        return []
    return [
        f"  rows        {format_count(plan.num_rows)}: {counted(keep.num, 'position')} of a "
        f"sequence, seed {keep.seed}"
    ]
