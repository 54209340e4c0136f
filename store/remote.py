"""Opening the objects of a store, wherever they are."""

import os
from pathlib import Path

from mlsae.store.objects import LocalObjects, Objects


def open_objects(
    location: str | os.PathLike[str],
    *,
    cache_dir: Path | None = None,
    cache_bytes: int | None = None,
) -> Objects:
    """The objects of a store."""
    return LocalObjects(Path(location))
