"""The analysis directory: its names, its summary, and whether it may be replaced."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsae.base.directories import (
    content_of,
    has_staged,
    is_systems_own,
    require_free,
    require_outside_stores,
)
from mlsae.base.errors import InputError
from mlsae.base.files import DamagedFileError, read_sealed

KIND = "mlsae analysis"
SUMMARY = "summary.json"
EVENTS_NAME = "events"
FORMERLY = "activations"
"""Name of the events in analyses and directories of version 0.4, which are read as well."""
EXAMPLES_FILE = "examples.parquet"
FIGURES_FOLDER = "figures"
PAGE = "index.html"
_OURS = frozenset(
    {
        SUMMARY,
        "layers.parquet",
        "overall.parquet",
        "latents.parquet",
        "latent_layers.parquet",
        "prefixes.parquet",
        "histograms.parquet",
        "layer_cosine.parquet",
        "prompts.parquet",
        EVENTS_NAME,
        FORMERLY,
        EXAMPLES_FILE,
        FIGURES_FOLDER,
        PAGE,
    }
)


def read_summary(directory: Path) -> dict[str, Any]:
    """The summary of an analysis, checked.

    Raises:
        InputError: the directory holds none, or a damaged one.
    """
    path = directory / SUMMARY
    if not path.is_file():
        raise InputError(
            f"{directory} is no analysis: it has no {SUMMARY}; make one with mlsae analyze"
        )
    try:
        summary = read_sealed(path)
    except DamagedFileError as error:
        raise InputError(f"{error} with mlsae analyze") from None
    if summary.get("kind") != KIND:
        raise InputError(
            f"{directory} is no analysis: the kind in its {SUMMARY} is "
            f"{summary.get('kind')!r}, expected {KIND!r}"
        )
    if FORMERLY in summary:
        summary[EVENTS_NAME] = summary.pop(FORMERLY)
    return summary


def events_folder(directory: Path) -> Path:
    """Folder of the events in an analysis, or in a directory of `mlsae events`."""
    former = directory / FORMERLY
    return former if former.is_dir() else directory / EVENTS_NAME


def check_replaceable(out: Path) -> None:
    """Require that `out` is absent, an empty directory, or an analysis and nothing else.

    Raises:
        InputError: another file lies there, which no analysis wrote, `out` lies in a store, or
            another run writes there.
    """
    require_outside_stores(out, "--out")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a directory")
    require_free(out)
    names = set(content_of(out))
    if not names or (has_staged(out) and names <= _OURS):
        return
    if SUMMARY not in names:
        raise InputError(
            f"--out {out} holds other things than an analysis ({min(names)}); "
            f"give a directory that is empty or absent"
        )
    foreign = sorted(names - _OURS) or _foreign_inside(out, read_summary(out))
    if foreign:
        raise InputError(
            f"--out {out} holds an analysis, which would be replaced, and {foreign[0]}, which "
            f"mlsae did not write: move that away or give another directory"
        )


def _foreign_inside(out: Path, summary: Mapping[str, Any]) -> list[str]:
    """Files in the folders of an analysis that its summary does not name, sorted."""
    events = events_folder(out)
    parts = summary.get(EVENTS_NAME, {}).get("parts", ())
    ours = {out / name for name in summary.get("figures", ())}
    ours |= {events / part["path"] for part in parts}
    return sorted(
        str(path.relative_to(out))
        for folder in (events, out / FIGURES_FOLDER)
        for path in folder.rglob("*")
        if not (path.is_dir() or path in ours or is_systems_own(path.name))
        # A run that was killed while it drew leaves some.
        and path.suffix != ".partial"
    )
