"""What a store is, in one screen or as JSON."""

import os
from dataclasses import asdict
from typing import Any

from mlsae.base.units import format_bytes, format_count, format_ranges
from mlsae.store.errors import RemoteError
from mlsae.store.format.presets import preset_of
from mlsae.store.read.commits import (
    Producers,
    describe_producer,
    largest_added_fvu,
    num_shards_of,
    pending_shards,
)
from mlsae.store.read.store import Store, open_store


def store_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything a store says of itself, JSON-ready; complete or not.

    Raises:
        StoreError: there is no store, its tokens are not written, or a record is damaged.
    """
    # A few records are not worth keeping on this machine.
    store = open_store(path, incomplete=True, cache_bytes=0)
    num_shards = num_shards_of(store.plan)
    cost = largest_added_fvu(store.objects, store.plan)
    info: dict[str, Any] = {
        "path": store.place,
        "complete": store.is_complete,
        "store_id": store.store_id if store.is_complete else None,
        "plan_id": store.plan_id,
        "num_sequences": store.num_sequences,
        "num_rows": store.num_rows,
        "num_shards": num_shards,
        "num_committed": num_shards - len(pending_shards(store.objects, store.plan)),
        "num_bytes": _num_bytes(store),
        "plan": store.plan,
        "added_fvu": None if cost is None else asdict(cost),
        "producers": [
            {"producer": producer, "num_shards": len(shards)}
            for producer, shards in Producers(store.objects, store.plan).by_shard()
        ],
        "provenance": _provenance(store),
    }
    if store.is_complete:
        moments = {site: store.moments(site) for site in store.sites}
        info["moments"] = {
            site: {
                "num_rows": of_site.count,
                "layers": list(of_site.layers),
                "mean_norm": of_site.norm_mean.tolist(),
                "max_abs": of_site.max_abs.tolist(),
                "adjacent_cosine": of_site.adjacent_cosine().tolist(),
            }
            for site, of_site in moments.items()
        }
    return info


def _num_bytes(store: Store) -> int | None:
    try:
        return sum(size for _, size in store.objects.walk())
    except RemoteError:
        return None


def _provenance(store: Store) -> list[dict[str, Any]]:
    try:
        return store.provenance()
    except RemoteError:
        return []


def format_info(info: dict[str, Any]) -> str:
    """The human form of `store_info`."""
    plan = info["plan"]
    state = "complete" if info["complete"] else "incomplete"
    # Producers record what they like.
    models = [run["model"] for run in info["provenance"] if isinstance(run.get("model"), dict)]
    model = models[-1].get("name") if models else None
    lines = [
        f"{info['path']}: {state}, schema {plan['schema_version']}",
        f"  model       {model if isinstance(model, str) else '(not recorded)'}",
        f"  tokens      {format_count(plan['num_tokens'])} in {format_count(info['num_sequences'])}"
        f" sequences of {plan['context_length']}",
        *_rows_line(info),
        f"  activations {', '.join(plan['sites'])}; layers {format_ranges(plan['layers'])}; "
        f"d_model {plan['d_model']}; {preset_of(plan)}",
        *_cost_line(info),
        f"  shards      {info['num_committed']} of {info['num_shards']} committed, "
        f"{format_count(plan['shard_rows'])} rows each",
        *(
            f"  made by     {describe_producer(made['producer'])}: "
            f"{format_count(made['num_shards'])} shards"
            for made in info["producers"]
        ),
        f"  on disk     {_size(info['num_bytes'])}",
        f"  plan_id     {info['plan_id']}",
        f"  store_id    {info['store_id'] or '(when complete)'}",
    ]
    for site, moments in info.get("moments", {}).items():
        lines += ["", format_moments(site, moments)]
    return "\n".join(lines)


def format_moments(site: str, moments: dict[str, Any]) -> str:
    """A table by layer: mean norm, largest magnitude, pooled cosine with the next layer."""
    rows = [
        f"  {site}, {format_count(moments['num_rows'])} eligible rows a layer "
        f"(position 0, special, padding and masked tokens left out)",
        f"  {'layer':>5} {'mean norm':>10} {'max |x|':>10} {'cosine to next':>15}",
    ]
    cosines = [*moments["adjacent_cosine"], None]
    for layer, norm, largest, cosine in zip(
        moments["layers"], moments["mean_norm"], moments["max_abs"], cosines, strict=True
    ):
        last = "" if cosine is None else f"{cosine:.3f}"
        rows.append(f"  {layer:>5} {norm:>10.4g} {largest:>10.4g} {last:>15}")
    return "\n".join(rows)


def _size(num_bytes: int | None) -> str:
    return "(the server does not list it)" if num_bytes is None else format_bytes(num_bytes)


def _cost_line(info: dict[str, Any]) -> list[str]:
    cost = info["added_fvu"]
    if cost is None:
        return []
    decile = "" if cost["decile"] is None else f"; {cost['decile']:.2g} in a decile of row norm"
    return [
        f"  added FVU   {cost['total']:.2g} at most, in shard {cost['shard']} (layer "
        f"{cost['layer']}, {cost['site']}){decile}"
    ]


def _rows_line(info: dict[str, Any]) -> list[str]:
    keep = info["plan"]["keep_positions"]
    if keep is None:
        return []
    return [
        f"  rows        {format_count(info['num_rows'])}: {keep['num']} positions of a sequence, "
        f"seed {keep['seed']}"
    ]
