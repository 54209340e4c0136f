"""`index.html`, one page that holds an analysis and loads nothing else."""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
from markupsafe import Markup

from mlsae.analyze.results.analysis import Analysis
from mlsae.analyze.results.page.examples import examples_data
from mlsae.analyze.results.page.figures import drawn, embed_figures
from mlsae.analyze.results.page.json import as_json
from mlsae.analyze.results.page.latents import COLUMNS, choose, latents_data
from mlsae.analyze.results.page.provenance import commands_rows, provenance, settings_rows
from mlsae.analyze.results.page.tables import (
    definitions,
    headline,
    layer_table,
    missing,
    number,
    numbers,
    variance_table,
)
from mlsae.base.files import write_durably
from mlsae.base.units import counted

MAX_BYTES = 6_000_000
"""Largest size of a page, whatever the analysis."""

FIGURE_BYTES = 2_000_000
"""Part of the page's bytes for figures."""

EXAMPLE_BYTES = 2_500_000
"""Part of the page's bytes for examples, or less where the others leave less."""

_FRAME_BYTES = 600_000
"""Part of the page's bytes for tables, provenance, style and script."""

_TEMPLATES = Path(__file__).with_name("templates")


def write_page(analysis: Analysis, path: Path) -> None:
    """Write the page of an analysis; equal tables and figures give equal bytes.

    Args:
        analysis: the analysis, with its figures in its directory.
        path: the file, which is replaced.

    Raises:
        ResourceError: the disk is full.
    """
    # A summary may name a path whose bytes are no UTF-8.
    write_durably(path, render(analysis).encode("utf-8", "replace"))


def render(analysis: Analysis) -> str:
    """The page as text."""
    summary = analysis.summary
    figures, left_out, num_bytes = embed_figures(analysis, FIGURE_BYTES)
    num_layers = len(analysis.latent_layers) // len(analysis.latents)
    chosen, rule = choose(analysis.latents, num_layers)
    data = latents_data(analysis.latents, analysis.latent_layers, chosen)
    examples = analysis.examples
    notes = [f"Figures left out to keep this page small: {', '.join(left_out)}"] if left_out else []
    if absent := drawn(analysis)[1]:
        notes.append(f"Figures that could not be drawn: {', '.join(absent)}")
    if examples is None:
        notes.append("Examples of latents: this analysis has no table of them.")
    else:
        told = summary.get("examples")
        if isinstance(told, Mapping) and told.get("no_text_because"):
            notes.append(f"Examples are token ids without text: {told['no_text_because']}")
        room = MAX_BYTES - _FRAME_BYTES - num_bytes - len(as_json(data).encode())
        data |= examples_data(examples, chosen, min(EXAMPLE_BYTES, room))
    described = {
        name: f"{text} ({unit})" if unit else text
        for name, (unit, text) in definitions(analysis.latents.schema).items()
        if name in data["columns"]
    }
    data |= {
        "names": dict(COLUMNS),
        "about": described,
        "context_length": summary["context_length"],
        "num_rows": summary["num_rows"],
    }
    script, style = (
        (_TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.js", "page.css")
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html").render(
        title=_title(summary),
        summary=summary,
        rows=number(summary["num_rows"]),
        sequences=counted(summary["num_sequences"], "sequence"),
        headline=headline(analysis),
        missing=missing(analysis, notes),
        notes=summary["notes"],
        figures=[figure for figure in figures if not figure["is_prompt"]],
        prompts=[figure for figure in figures if figure["is_prompt"]],
        table=layer_table(analysis),
        variance=variance_table(summary),
        decoder=numbers(summary["decoder"]),
        rule=rule,
        examples_left_out=not data.get("complete", True),
        num_shown=len(chosen),
        provenance=provenance(summary),
        settings=settings_rows(summary),
        commands=commands_rows(summary["commands"]),
        data=Markup(as_json(data)),
        script=Markup(script),
        style=Markup(style),
        script_hash=_csp_hash(script),
        style_hash=_csp_hash(style),
    )


def _csp_hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest())
    return f"sha256-{digest.decode()}"


def _title(summary: Mapping[str, Any]) -> str:
    model = PurePosixPath(str(summary["model"].get("name") or "an unnamed transformer"))
    # Two parts are a hub id, and tell more of a path than the last one alone.
    name = "/".join(model.parts[-2:])
    return (
        f"{counted(summary['overall']['num_latents'], 'latent')} on "
        f"{counted(len(summary['layers']), 'layer')} of {name}"
    )
