"""`index.html`: one page that holds an analysis, and asks for nothing else."""

import base64
import hashlib
import shlex
import struct
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
from markupsafe import Markup

from mlsae.analyze.config import AnalyzeConfig
from mlsae.analyze.page_examples import examples_data, find_examples
from mlsae.analyze.page_json import as_json
from mlsae.analyze.page_latents import COLUMNS, choose, latents_data
from mlsae.analyze.page_tables import (
    headline,
    layer_table,
    missing,
    number,
    provenance,
    settings,
    variance_table,
)
from mlsae.analyze.results import Analysis
from mlsae.base.files import write_durably

MAX_BYTES = 6_000_000
"""A page has at most so many bytes, whatever the analysis."""

FIGURE_BYTES = 2_000_000
"""Of them, those for figures."""

EXAMPLE_BYTES = 2_500_000
"""Of them, those for examples, or what the others leave."""

_FRAME_BYTES = 600_000
"""Of them, those for tables, provenance, style and script."""

_TEMPLATES = Path(__file__).with_name("templates")
_CAPTIONS = {
    "layer_distribution": "P(layer | latent) of every living latent, by mean layer",
    "fvu_delta_ce": "Variance unexplained and cross-entropy added, by layer",
    "norm_cosine": "Norms of the activations, and how alike neighbouring layers are",
    "density": "How often latents are active",
    "mean_layer": "Mean layers of latents, and their distance to a whole number",
    "decoder_cosine": "Cosines of two latents’ decoder directions",
    "layer_cosine": "Decoder cosine by distance of the mean layers",
}
_STAGES = ("harvest", "train", "analyze")
_PROMPT = "prompt_"
_PNG_HEAD = struct.Struct(">8s8xII")
_DRAWN_DPI = 160
"""Of the figures as files; their size on the page follows."""


def write_page(analysis: Analysis, path: Path) -> None:
    """Write the page of an analysis; equal tables and figures give equal bytes.

    Args:
        analysis: what is shown; its figures are read from its directory.
        path: the file, which is replaced.

    Raises:
        ResourceError: the disk is full.
    """
    # A path on disk may hold bytes that are no UTF-8, and be named in a summary.
    write_durably(path, render(analysis).encode("utf-8", "replace"))


def render(analysis: Analysis) -> str:
    """The page as text."""
    summary = analysis.summary
    figures, left_out, num_bytes = _figures(analysis)
    num_layers = len(analysis.latent_layers) // len(analysis.latents)
    chosen, rule = choose(analysis.latents, num_layers)
    data = latents_data(analysis.latents, analysis.latent_layers, chosen)
    examples = find_examples(analysis.path)
    notes = [f"Figures left out to keep this page small: {', '.join(left_out)}"] if left_out else []
    if examples is None:
        notes.append("Examples of what latents are active for: this analysis has no table of them.")
    else:
        room = MAX_BYTES - _FRAME_BYTES - num_bytes - len(as_json(data).encode())
        data |= examples_data(examples, chosen, min(EXAMPLE_BYTES, room))
    described = {name: about for name, about in _definitions(analysis) if name in data["columns"]}
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
        headline=headline(analysis),
        missing=missing(analysis, notes),
        notes=summary["notes"],
        figures=[figure for figure in figures if not figure["is_prompt"]],
        prompts=[figure for figure in figures if figure["is_prompt"]],
        table=layer_table(analysis),
        variance=variance_table(summary),
        decoder=[(name, number(value)) for name, value in summary["decoder"].items()],
        rule=rule,
        examples_left_out=not data.get("complete", True),
        num_shown=len(chosen),
        provenance=provenance(summary),
        settings=settings(summary, [field.name for field in fields(AnalyzeConfig)]),
        commands=_commands(summary["commands"]),
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
    # The last two parts of a path say more than `model`; a hub id has no more.
    name = "/".join(model.parts[-2:])
    layers = len(summary["layers"])
    return (
        f"{number(summary['overall']['num_latents'])} latents on {layers} "
        f"layer{'' if layers == 1 else 's'} of {name}"
    )


def _definitions(analysis: Analysis) -> list[tuple[str, str]]:
    """Name and definition of each column of `latents`, as its file says."""
    found = []
    for field in analysis.latents.schema:
        about = {k.decode(): v.decode() for k, v in (field.metadata or {}).items()}
        unit = about.get("unit", "")
        text = about.get("description", "")
        found.append((field.name, f"{text} ({unit})" if unit not in {"", "1"} else text))
    return found


def _commands(found: Mapping[str, Sequence[str] | str]) -> list[tuple[str, list[str], str]]:
    """Stage, its commands, and why there are none; in the order in which they are run."""
    stages = sorted(found, key=_STAGES.index)
    return [
        (stage, [], found[stage])
        if isinstance(found[stage], str)
        else (stage, [_broken(line) for line in found[stage]], "")
        for stage in stages
    ]


def _broken(command: str) -> str:
    """A command with each option on a line of its own, which a shell reads as one."""
    words = shlex.split(command)
    starts = [n for n, word in enumerate(words) if word.startswith("-")]
    ends = [0, *starts, len(words)]
    return " \\\n    ".join(shlex.join(words[a:b]) for a, b in pairwise(ends))


def _figures(analysis: Analysis) -> tuple[list[dict[str, Any]], list[str], int]:
    """The figures as data URIs, those of prompts last; those without room; bytes of the former."""
    names = [name for name in analysis.summary["figures"] if name.endswith(".png")]
    names.sort(key=lambda name: PurePosixPath(name).name.startswith(_PROMPT))
    found: list[dict[str, Any]] = []
    left_out, num_bytes = [], 0
    for name in names:
        image = (analysis.path / name).read_bytes()
        uri = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        if num_bytes + len(uri) > FIGURE_BYTES:
            left_out.append(name)
            continue
        num_bytes += len(uri)
        stem = PurePosixPath(name).stem
        _, width, height = _PNG_HEAD.unpack_from(image)
        found.append(
            {
                "uri": uri,
                "name": name,
                "caption": _CAPTIONS.get(stem, stem.replace("_", " ").capitalize()),
                "is_prompt": stem.startswith(_PROMPT),
                "width": round(width * 96 / _DRAWN_DPI),
                "height": round(height * 96 / _DRAWN_DPI),
            }
        )
    return found, left_out, num_bytes
