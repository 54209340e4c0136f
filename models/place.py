"""Where a model is looked for: a directory of this machine or the hub."""

from dataclasses import dataclass
from pathlib import Path

from mlsae.base.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where a model is looked for."""

    name: str
    """Hub id, or the absolute path of a local directory."""
    revision: str | None
    """Branch, tag or commit of a hub model; None for a local directory."""
    is_directory: bool
    """Whether it is a local directory."""

    @classmethod
    def of(cls, name_or_path: str | Path, revision: str | None) -> "Place":
        """A directory where there is one of that name, else the hub.

        Raises:
            InputError: what can only be a path is no directory.
        """
        text = str(name_or_path)
        path = Path(text).expanduser()
        if path.is_dir():
            return cls(str(path.resolve()), None, True)
        if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
            raise InputError(f"there is no model directory {text}; give another path or a hub id")
        return cls(text, revision, False)
