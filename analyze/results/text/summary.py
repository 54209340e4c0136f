"""The numbers of the whole SAE, and the text that ends an analysis."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlsae.analyze.results.analysis import Analysis
from mlsae.analyze.results.directory import FIGURES_FOLDER, events_folder
from mlsae.analyze.results.page.figures import drawn
from mlsae.analyze.results.records import describe
from mlsae.base.units import counted, format_count, format_ranges


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
    """A table by layer, its units, reasons for missing numbers, and paths."""
    summary = analysis.summary
    directions = analysis.layers["pca_directions"].drop_null().to_pylist()
    lines = [*_table(analysis), *_units(analysis, directions), *_prefixes(analysis)]
    if summary["cross_entropy"] is None:
        lines.append(f"delta CE was not measured: {summary['no_cross_entropy_because']}")
    examples = summary["examples"]
    if examples is not None and (reason := examples["no_text_because"]) is not None:
        lines.append(f"examples have token ids and no text: {reason}")
    lines += [f"note: {note}" for note in summary["notes"]]
    lines.append("")
    if analysis.page.is_file():
        lines.append(f"page      {analysis.page}")
    lines += [
        f"tables    {analysis.path}/*.parquet",
        f"events    {events_folder(analysis.path)} ({describe(summary['events'])})",
    ]
    if there := drawn(analysis)[0]:
        lines.append(f"figures   {analysis.path / FIGURES_FOLDER} ({len(there)})")
    if examples is not None:
        lines.append(f"examples  mlsae examples {analysis.path} LATENT")
    return "\n".join(lines)


def _table(analysis: Analysis) -> list[str]:
    """A line a layer; columns that were measured nowhere are left out."""
    rows, num_latents = analysis.layers.to_pylist(), len(analysis.latents)
    columns = {
        "FVU": [_text(row["fvu"], ".4f") for row in rows],
        "PCA": [_text(row["fvu_pca"], ".4f") for row in rows],
        "delta CE": [_text(row["delta_ce"], ".3f") for row in rows],
        "L0": [_text(row["l0"], ".1f") for row in rows],
        "dead latents": [
            f"{format_count(dead)} ({dead / num_latents:.1%})"
            for dead in (num_latents - used for used in _used_latents(analysis))
        ],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    shown = [["layer", *columns]]
    layers = [str(row["layer"]) for row in rows]
    shown += [list(cells) for cells in zip(layers, *columns.values(), strict=True)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in shown]


def _units(analysis: Analysis, directions: list[int]) -> list[str]:
    """Rows behind the table, and the meaning of its columns, in lines of 80 characters."""
    summary, total = analysis.summary, analysis.summary["overall"]
    lines = [
        f"{counted(summary['num_rows'], 'row')} of "
        f"{counted(summary['num_sequences'], 'sequence')} ({summary['rows']}), positions from "
        f"{summary['skip_positions']}",
        "FVU: 0 is perfect, 1 the mean"
        + (
            f"; PCA: FVU of {format_ranges(sorted(set(directions)))} principal directions"
            if directions
            else ""
        ),
    ]
    if summary["cross_entropy"] is not None:
        ce = analysis.layers["ce"][0].as_py()
        tokens = counted(summary["cross_entropy"]["num_tokens"], "token")
        lines.append(f"delta CE: nats a token beside the model's {ce:.4f}, over {tokens}")
    lines.append(
        f"dead latents: used by no such row of the layer; at every layer: "
        f"{format_count(total['num_dead'])} of {format_count(total['num_latents'])} "
        f"({total['dead_fraction']:.1%})"
    )
    return lines


def _prefixes(analysis: Analysis) -> list[str]:
    """A line for each prefix of the latents, over all layers; none for an SAE without prefixes."""
    found = [row for row in analysis.prefixes.to_pylist() if row["layer"] is None]
    if len(found) < 2:
        return []
    lines = ["first latents     FVU      L0  layer entropy    dead"]
    for row in found:
        cells = [_text(row["fvu"], ".4f"), _text(row["l0"], ".2f")]
        cells += [_text(row["layer_entropy"], ".3f"), format(row["dead_fraction"], ".1%")]
        lines.append("{:>13} {:>7} {:>7} {:>14} {:>7}".format(row["num_latents"], *cells))
    return [
        *lines,
        "first latents: rows of all layers, by those alone; layer entropy: nats, mean over living",
    ]


def _used_latents(analysis: Analysis) -> list[int]:
    """Latents that some row of each layer uses."""
    used = analysis.latent_layers.filter(pc.greater(analysis.latent_layers["count"], 0))
    counts = used.group_by("layer").aggregate([([], "count_all")])
    found = dict(zip(counts["layer"].to_pylist(), counts["count_all"].to_pylist(), strict=True))
    return [found.get(layer, 0) for layer in analysis.layers["layer"].to_pylist()]


def _text(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)
