"""The numbers of the page, as plain text: headline, tables, missing ones."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from mlsae.analyze.results.analysis import Analysis
from mlsae.base.units import counted, format_count, portion

Row = Mapping[str, Any]

_GROUPS: Mapping[str, tuple[str, ...]] = {
    "Reconstruction": (
        "fvu",
        "fvu_published",
        "fvu_position_0_in",
        "fvu_published_position_0_in",
        "fvu_position_0_out",
        "fvu_published_position_0_out",
        "explained_variance",
        "mse",
        "cosine",
        "relative_reconstruction_bias",
        "fvu_pca",
        "pca_directions",
    ),
    "Latents": (
        "l0",
        "l1",
        "density",
        "dead_fraction",
        "frequent_fraction",
        "always_on_fraction",
    ),
    "Next-token prediction": (
        "ce",
        "ce_store",
        "ce_sae",
        "delta_ce",
        "ce_zero",
        "ce_zero_eligible",
        "ce_mean",
        "loss_recovered_zero",
        "loss_recovered_zero_eligible",
        "loss_recovered_mean",
        "kl",
        "top1_agreement",
        "delta_ce_spliced",
        "kl_spliced",
        "top1_agreement_spliced",
    ),
    "The store's activations": ("norm", "adjacent_cosine", "adjacent_cosine_pooled"),
}
_NOT = "not measured"
_REST = "Counts and others"
_TERMS = ("single", "tokens", "latents", "aggregate", "total")
_RATIOS = ("single_over_aggregate", "aggregate_over_total")
_DECOMPOSITIONS = {"mass": "mass", "pair_uniform": "pair-uniform", "as_coded": "as coded"}


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits, or in full where it is whole; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return format_count(value)
    return f"{value:.{digits}g}".replace("-", "−")


def numbers(found: Row) -> list[tuple[str, str]]:
    """Name and text of each number among some values, and of None."""
    return [(k, number(v)) for k, v in found.items() if v is None or isinstance(v, int | float)]


def interval(row: Row, name: str, digits: int = 4) -> str:
    """The 95% interval of a column, or an empty text."""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return "" if low is None or high is None else f"{number(low, digits)} to {number(high, digits)}"


def headline(analysis: Analysis) -> list[dict[str, str]]:
    """The main numbers: `name`, `value`, `interval`, and the meaning as `text`."""
    summary = analysis.summary
    mean, together = analysis.overall.to_pylist()
    total, variance = summary["overall"], summary["layer_variance"]
    spread = "" if variance is None else variance["mass"]["single_over_aggregate"]
    at_one = (
        f" At a single token, {spread:.0%} of the variance is there."
        if isinstance(spread, float)
        else ""
    )
    measured = summary["cross_entropy"] is not None
    recovered = mean["loss_recovered_mean"]
    free = measured and recovered is None
    splice = (
        ""
        if together["delta_ce"] is None
        else f" With all layers spliced at once: {number(together['delta_ce'])}."
    )
    return [
        {
            "name": "Variance unexplained (FVU)",
            "value": number(mean["fvu"]),
            "interval": interval(mean, "fvu"),
            "text": "The share of the activations’ variance that their reconstructions miss; "
            "0 is perfect. Mean over layers.",
        },
        {
            "name": "Cross-entropy added (delta CE)",
            "value": number(mean["delta_ce"]) if measured else _NOT,
            "interval": interval(mean, "delta_ce"),
            "text": "Nats a token by which the loss grows when one layer’s activations are "
            f"replaced by their reconstructions. Mean over layers.{splice}",
        },
        {
            "name": "Loss recovered",
            "value": "undefined" if free else number(recovered) if measured else _NOT,
            "interval": interval(mean, "loss_recovered_mean"),
            "text": "Share of the cross-entropy added by the mean activation in a layer’s place "
            "that its reconstruction saves; 1 is all. Mean over layers."
            + (" At a layer here, the mean adds nothing." if free else ""),
        },
        {
            "name": "Active latents (L0)",
            "value": number(mean["l0"]),
            "interval": interval(mean, "l0"),
            "text": f"Latents that are active for a row, of {number(total['num_latents'])}. "
            "Mean over layers.",
        },
        {
            "name": "Dead latents",
            "value": f"{total['dead_fraction']:.2%}",
            "interval": "",
            "text": f"{portion(total['num_dead'], total['num_latents'], 'latent')} "
            f"active at none of {counted(summary['num_rows'], 'evaluated row')}; counted, so "
            "there is no interval.",
        },
        {
            "name": "Layer spread",
            "value": number(total["mean_layer_std"]),
            "interval": "",
            "text": "Standard deviation of the layer at which a latent is active, in layers; mean "
            f"over living latents, without an interval.{at_one}",
        },
    ]


def definitions(schema: pa.Schema) -> dict[str, tuple[str, str]]:
    """Unit, empty for pure numbers, and definition of each column, from its file."""
    found = {}
    for field in schema:
        about = {k.decode(): v.decode() for k, v in (field.metadata or {}).items()}
        unit = about.get("unit", "")
        found[field.name] = ("" if unit == "1" else unit, about.get("description", ""))
    return found


def layer_table(analysis: Analysis) -> dict[str, Any]:
    """Every value of the tables `layers` and `overall`, a row a metric, a column a layer.

    Returns:
        `layers`, their ids; `groups`, each a name and rows of name, unit, definition and cells
        (value, interval): mean over layers, all layers together, then layer by layer. Metrics that
        were measured nowhere are left out.
    """
    layers, (mean, together) = analysis.layers.to_pylist(), analysis.overall.to_pylist()
    about = definitions(analysis.overall.schema) | definitions(analysis.layers.schema)
    plain = [
        field.name
        for field in analysis.layers.schema
        if field.name != "layer"
        and not field.name.endswith(("_low", "_high"))
        and (pa.types.is_integer(field.type) or pa.types.is_floating(field.type))
    ]
    named = {name for names in _GROUPS.values() for name in names}
    groups = {**_GROUPS, _REST: tuple(name for name in plain if name not in named)}
    found = []
    for group, names in groups.items():
        rows = []
        for name in names:
            cells = [_cell(row, name) for row in (mean, together, *layers)]
            if all(value == "–" for value, _ in cells):
                continue
            unit, text = about.get(name, ("", ""))
            rows.append({"name": name, "unit": unit, "text": text, "cells": cells})
        if rows:
            found.append({"name": group, "rows": rows})
    if prefixes := _prefixes(analysis, [row["layer"] for row in layers]):
        found.append({"name": "First latents alone", "rows": prefixes})
    return {"layers": [row["layer"] for row in layers], "groups": found}


def _prefixes(analysis: Analysis, layers: list[int]) -> list[dict[str, Any]]:
    """Rows of the layer table for each prefix but that of all latents."""
    about = definitions(analysis.prefixes.schema)
    found = analysis.prefixes.to_pylist()
    widths = sorted({row["num_latents"] for row in found})
    by_place = {(row["num_latents"], row["layer"]): row for row in found}
    return [
        {
            "name": f"{name}, first {format_count(width)}",
            "unit": about[name][0],
            "text": about[name][1],
            "cells": [
                (number(by_place.get((width, layer), {}).get(name)), "")
                for layer in ("mean", None, *layers)
            ],
        }
        for width in widths[:-1]
        for name in ("fvu", "l0", "layer_entropy", "dead_fraction")
    ]


def _cell(row: Row, name: str) -> tuple[str, str]:
    return number(row.get(name)), interval(row, name, 3)


def variance_table(summary: Row) -> list[tuple[str, list[str]]]:
    """Rows of the decomposition of the layer's variance; none without an active latent."""
    found = summary["layer_variance"]
    if found is None:
        return []
    return [
        (label, [number(found[key].get(name)) for name in (*_TERMS, *_RATIOS)])
        for key, label in _DECOMPOSITIONS.items()
    ]


def missing(analysis: Analysis, others: Iterable[str]) -> list[str]:
    """Missing content that a reader may look for, with the reason, one line each."""
    summary = analysis.summary
    lines = []
    if summary["cross_entropy"] is None:
        lines.append(
            "Cross-entropy, delta CE, loss recovered, KL and top-1 agreement were not measured: "
            + str(summary["no_cross_entropy_because"])
        )
    if _is_null(analysis.latents, "embedding_cosine"):
        lines.append(
            "Cosines with the token embedding and the unembedding are missing: they take a "
            "transformer whose width is that of the SAE."
        )
    return [*lines, *others]


def _is_null(table: pa.Table, name: str) -> bool:
    return bool(table[name].null_count == len(table))
