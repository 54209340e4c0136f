"""The directory of a run: whose it is, before anything is written into it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsae.base.directories import content_of, require_outside_stores
from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed, remove_stale_partials, seal, write_durably
from mlsae.sae.directory import CONFIG
from mlsae.train.sweep import SWEEP

RUN = "run.json"
LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
CURVES = "curves.png"
DIVERGED = "diverged.json"


def check_output(
    out: Path, settings: Mapping[str, Any], *, resume: bool, record: str = RUN, last: str = CONFIG
) -> bool:
    """See whether a run with these settings may write to `out`.

    Args:
        out: the directory.
        settings: settings of the run.
        resume: continue this very run.
        record: file that says whose the directory is.
        last: file that is written last.

    Returns:
        True if that very run is there and finished.

    Raises:
        InputError: `out` holds something else, another run, or this run although `resume` was not
            asked for.
    """
    require_outside_stores(out, "--out")
    # A run that was killed while it made the directory its own leaves a temporary file.
    names = content_of(out)
    if not names:
        return False
    if record not in names:
        raise InputError(
            f"{out} holds other files ({names[0]}) and no training run: choose another --out"
            if RUN not in names and SWEEP not in names
            else f"{out} holds {'one SAE' if RUN in names else 'several SAEs of a sweep'}, not "
            f"{'one' if record == RUN else 'a sweep'}: choose another --out"
        )
    theirs = read_sealed(out / record)
    different = [
        f"{name} {_show(theirs.get(name))} there, {_show(settings.get(name))} here"
        for name in sorted(theirs.keys() | settings.keys())
        if theirs.get(name) != settings.get(name)
    ]
    if different:
        raise InputError(
            f"{out} holds another run: {'; '.join(different)}. Choose another --out, or give the "
            f"settings of that run"
        )
    if not resume:
        raise InputError(
            f"{out} holds this run already: add --resume to continue it, or choose another --out"
        )
    return (out / last).is_file()


def claim(out: Path, settings: Mapping[str, Any], record: str = RUN) -> None:
    """Make `out` this run's."""
    out.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(out)
    write_durably(out / record, seal(settings))


def _show(value: object) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
