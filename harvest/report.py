"""Lines about a dry run and a finished store: sizes, the table by layer, the cost of int8."""

from collections.abc import Iterator, Mapping

import numpy as np

from mlsae.base.machine.resources import free_disk
from mlsae.base.units import (
    counted,
    format_bytes,
    format_count,
    format_duration,
    format_ranges,
)
from mlsae.harvest.config import ALL_ENCODINGS
from mlsae.harvest.outliers import outlier_lines
from mlsae.harvest.plan import Request
from mlsae.harvest.text.packing import PackedText
from mlsae.models import Transformer
from mlsae.store import Store
from mlsae.store.format.layout import Layout
from mlsae.store.format.presets import PRESETS
from mlsae.store.read.commits import largest_added_fvu

DECODED_TOKENS = 40


def dry_run_lines(
    request: Request,
    packed: PackedText,
    sizes: Mapping[str, Layout],
    chosen: str,
    seconds: float | None,
    model: Transformer,
) -> Iterator[str]:
    """Describe the store that the command would write without --dry-run.

    Args:
        request: the settings, resolved.
        packed: the text.
        sizes: rows, shards and bytes of the store in each encoding.
        chosen: encoding that the harvest would take.
        seconds: time of all forward passes; None where none was tried.
        model: the model, for the text of tokens.
    """
    config = request.config
    yield (
        f"activations: {' and '.join(request.sites)} of {counted(len(request.layers), 'layer')} "
        f"({format_ranges(request.layers)} of 0–{model.num_layers - 1}), {model.d_model} channels, "
        f"{counted(sizes[chosen].num_rows, 'row')} of each layer"
    )
    for name in sizes if config.encoding == ALL_ENCODINGS else (chosen,):
        size = sizes[name]
        bound = "" if PRESETS[name].compression == "none" else "at most "
        auto = " (auto)" if config.encoding == "auto" else ""
        yield (
            f"{name}{auto}: {bound}{format_bytes(size.total_bytes)}, shards of each layer: "
            f"{format_count(size.num_shards)} of up to {counted(size.shard_rows, 'row')}"
        )
    if seconds is not None:
        yield f"time: about {format_duration(seconds)} for the transformer here, by one batch of it"
    yield f"free at {config.out}: {format_bytes(free_disk(config.out))}"
    first_ids = packed.tokens[:DECODED_TOKENS].tolist()
    try:
        beginning = model.tokenizer.decode(first_ids)
    except Exception:  # Token ids from elsewhere may be none of the tokenizer's.
        beginning = first_ids
    # As a literal: newlines and control characters of the text must not break the report.
    first = counted(min(DECODED_TOKENS, len(packed.tokens)), "token")
    yield f"first {first}: {beginning!r}"
    yield "dry run: nothing was written"


def layer_tables(store: Store) -> Iterator[str]:
    """Mean norm, largest magnitude and cosine to the next layer, by site, from the moments;
    warnings to be read before training."""
    for site in store.sites:
        moments = store.moments(site, skip_positions=1)
        cosines = [f"{value:.4f}" for value in moments.adjacent_cosine()] + [""]
        if len(store.sites) > 1:
            yield f"{site}:"
        yield f"{'layer':>5}  {'mean norm':>10}  {'largest |x|':>11}  {'cosine to next':>14}"
        for layer, norm, largest, cosine in zip(
            moments.layers, moments.norm_mean, moments.max_abs, cosines, strict=True
        ):
            yield f"{layer:>5}  {_figure(norm):>10}  {_figure(largest):>11}  {cosine:>14}"
        yield from outlier_lines(store, site)
    rows = counted(moments.count, "row")
    yield f"over {rows} of each layer, without position 0 and special tokens"
    yield "cosine: pooled over rows, about each layer's mean"


def encoding_lines(store: Store) -> Iterator[str]:
    """Largest cost of int8; other encodings cost nothing that anybody would notice."""
    if store.encoding != "int8":
        return
    cost = largest_added_fvu(store.objects, store.plan)
    if cost is not None:
        decile = "" if cost.decile is None else f", {cost.decile:.2g} to a decile of row norm"
        yield (
            f"int8 adds an FVU of at most {cost.total:.2g} to a shard (layer {cost.layer}, "
            f"{cost.site}){decile}"
        )


def last_line(store: Store, num_bytes: int, seconds: float) -> str:
    """Summary of the store, its place and the time it took."""
    sites = f" at {counted(len(store.sites), 'site')}" if len(store.sites) > 1 else ""
    return (
        f"harvested {counted(store.num_tokens, 'token')}, {counted(store.num_rows, 'row')} of "
        f"each of {counted(len(store.layers), 'layer')}{sites}, in {seconds:.1f} s to "
        f"{store.place}: {format_bytes(num_bytes)}, store_id {store.store_id[:12]}"
    )


def _figure(value: float) -> str:
    return np.format_float_positional(value, precision=5, unique=False, fractional=False, trim="-")
