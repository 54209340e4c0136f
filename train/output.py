"""The directory of a run: whose it is, before anything is written into it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed, seal, write_durably
from mlsae.sae.directory import CONFIG

RUN = "run.json"
LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"


def check_output(out: Path, settings: Mapping[str, Any], *, resume: bool) -> bool:
    """See whether a run with these settings may write to `out`.

    Returns:
        True if that very run is there and finished.

    Raises:
        InputError: `out` holds something else, another run, or this run although `resume` was not
            asked for.
    """
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / RUN).is_file():
        raise InputError(
            f"{out} holds other files ({min(p.name for p in out.iterdir())}) and no training "
            f"run: choose another --out"
        )
    theirs = read_sealed(out / RUN)
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
    return (out / CONFIG).is_file()


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Make `out` this run's."""
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / RUN, seal(settings))


def _show(value: object) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
