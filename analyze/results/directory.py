"""The analysis directory, which appears whole and replaces nothing but an analysis."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlsae.base.errors import InputError
from mlsae.base.files import DamagedFileError, fsync_directory, read_sealed

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
        InputError: another file lies there, which no analysis wrote.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out {out} is a file; give a directory")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    if SUMMARY not in names:
        raise InputError(
            f"--out {out} holds other things than an analysis ({sorted(names)[0]}); "
            f"give a directory that is empty or absent"
        )
    read_summary(out)
    if foreign := sorted(names - _OURS):
        raise InputError(
            f"--out {out} holds an analysis, which would be replaced, and {foreign[0]}, which "
            f"mlsae did not write: move that away or give another directory"
        )


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` when the block ends without an exception.

    After an exception the folder is removed and `out` is as it was. A process that is killed leaves
    a hidden sibling named `.<name>.<random>.partial`, which may be deleted.
    """
    out = Path(os.path.realpath(out))
    made = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    partial = out.with_name(f".{out.name}.{token}.partial")
    partial.mkdir()
    try:
        yield partial
        _fsync_all(partial)
        if out.exists():
            old = out.with_name(f".{out.name}.{token}.old")
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
        fsync_directory(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            parent.rmdir()
        raise


def _fsync_all(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for name in files:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(folder))
