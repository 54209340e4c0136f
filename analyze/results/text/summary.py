"""The numbers of the whole SAE, and the text that ends an analysis."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlsae.analyze.results.analysis import Analysis
from mlsae.analyze.results.directory import EXAMPLES_FILE, FIGURES_FOLDER, events_folder
from mlsae.analyze.results.records import describe
from mlsae.base.units import counted, format_count

_SHOWN = {
    "fvu": ".4f",
    "fvu_published": ".4f",
    "fvu_position_0_in": ".4f",
    "mse": ".3g",
    "l0": ".1f",
    "l1": ".3g",
    "norm": ".3g",
    "ce_store": ".4f",
    "ce_sae": ".4f",
    "delta_ce": ".4f",
    "kl": ".4f",
}
"""Columns of `layers` that are printed, with their formats."""
_MEAN = ("fvu", "fvu_published", "cosine", "delta_ce", "loss_recovered_mean")
_TOGETHER = ("delta_ce", "loss_recovered_mean", "kl", "top1_agreement")


def overall(layers: pa.Table, latents: pa.Table) -> dict[str, Any]:
    """The numbers of the whole SAE.

    Means are over layers, each weighing the same, or over living latents; a mean is None where one
    of its terms is.
    """
    num_dead = int(pc.sum(latents["dead"]).as_py())
    return {
        **{f"mean_{name}": _mean(layers[name]) for name in ("fvu", "fvu_published", "delta_ce")},
        "num_latents": len(latents),
        "num_dead": num_dead,
        "dead_fraction": num_dead / len(latents),
        "mean_layer_std": pc.mean(latents["layer_std"]).as_py(),
    }


def _mean(column: pa.ChunkedArray) -> float | None:
    return None if column.null_count else float(pc.mean(column).as_py())


def render(analysis: Analysis) -> str:
    """A table by layer, the numbers of the SAE, reasons for missing ones, and paths."""
    summary, total = analysis.summary, analysis.summary["overall"]
    num_layers = len(analysis.layers)
    columns = [name for name in _SHOWN if analysis.layers[name].null_count < num_layers]
    rows = [["layer", *columns]]
    rows += [
        [str(row["layer"]), *(_text(row[name], _SHOWN[name]) for name in columns)]
        for row in analysis.layers.to_pylist()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines += [
        "",
        f"{counted(summary['num_rows'], 'row')} over {counted(num_layers, 'layer')} "
        f"({summary['rows']}: {counted(summary['num_sequences'], 'sequence')} of "
        f"{summary['context_length']} tokens, positions from {summary['skip_positions']})",
        *_over_layers(analysis.overall),
        f"dead latents on these rows: {total['dead_fraction']:.2%} "
        f"({format_count(total['num_dead'])} of {format_count(total['num_latents'])})",
        f"mean standard deviation of a latent's layer: {_text(total['mean_layer_std'])}",
    ]
    lines += _layer_variance(summary["layer_variance"])
    decoder = summary["decoder"]
    lines.append(
        f"largest decoder cosine with another latent, mean over latents: {_text(decoder['mmcs'])} "
        f"(with an earlier one, as published: {_text(decoder['mmcs_published'])})"
    )
    if summary["cross_entropy"] is None:
        lines.append(
            "ce, ce_store, ce_sae, delta_ce, kl were not measured: "
            + summary["no_cross_entropy_because"]
        )
    else:
        ce = analysis.layers["ce"][0].as_py()
        tokens = counted(summary["cross_entropy"]["num_tokens"], "scored token")
        lines.append(f"untouched transformer: ce {ce:.4f} nats over {tokens}")
    examples = summary["examples"]
    if examples is not None and (reason := examples["no_text_because"]) is not None:
        lines.append(f"examples have token ids and no text: {reason}")
    lines += [f"note: {note}" for note in summary["notes"]]
    tables = f"{analysis.path}/{{layers,latents,latent_layers}}.parquet"
    lines += [
        "",
        f"tables    {tables}",
        f"events    {events_folder(analysis.path)} ({describe(summary['events'])})",
        *_of_examples(analysis),
        *_figures_at(analysis),
        f"page      {analysis.page}",
    ]
    return "\n".join(lines)


def _figures_at(analysis: Analysis) -> list[str]:
    """Path of the figures, if they were drawn."""
    if not analysis.summary["figures"]:
        return []
    names = ",".join(analysis.figures)
    return [f"figures   {analysis.path / FIGURES_FOLDER}/{{{names}}}.{{png,svg}}"]


def _of_examples(analysis: Analysis) -> list[str]:
    found = analysis.summary["examples"]
    if found is None:
        return []
    return [
        f"examples  {analysis.path / EXAMPLES_FILE} ({counted(found['num_examples'], 'row')}); "
        f"to read those of a latent: mlsae examples {analysis.path} LATENT"
    ]


def _layer_variance(found: Mapping[str, Any] | None) -> list[str]:
    """Spread of latents over layers at single tokens; nothing without an active latent."""
    if found is None:
        return []
    terms = (
        f"{name} {_text(of['single'])} of {_text(of['aggregate'])} "
        f"({_text(of['single_over_aggregate'], '.1%')})"
        for name, of in (("mass", found["mass"]), ("pair-uniform", found["pair_uniform"]))
    )
    coded = _text(found["as_coded"]["single_over_aggregate"], ".1%")
    return [
        f"variance of a latent's layer at a single token, of that over all tokens: "
        f"{', '.join(terms)}; by the published code {coded}",
        f"a latent that is active for a token is so at {found['layers_of_a_pair']:.2f} layers "
        f"(mean over {counted(found['num_tokens'], 'token')})",
    ]


def _over_layers(overall: pa.Table) -> list[str]:
    """Mean over layers and all layers at once, with 95% intervals; without null values."""
    mean, together = overall.to_pylist()
    lines = [f"mean over layers: {_values(mean, _MEAN)}"]
    if spliced := _values(together, _TOGETHER):
        lines.append(f"all layers spliced at once: {spliced}")
    return lines


def _values(row: dict[str, Any], names: tuple[str, ...]) -> str:
    parts = []
    for name in names:
        value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
        if value is not None:
            interval = "" if low is None else f" ({_text(low)} to {_text(high)})"
            parts.append(f"{name} {_text(value)}{interval}")
    return ", ".join(parts)


def _text(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)
