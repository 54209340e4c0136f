"""Arrays too long for memory: they grow in a nameless file, then are read as if they were there."""

import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mlsae.base.files import full_disk_explained


class Spool:
    """A one-dimensional array that grows on disk.

    The file has no name (or loses it at once), so that nothing of it is left behind however the
    process ends; its space is free again when the array is gone.
    """

    def __init__(self, near: Path, dtype: npt.DTypeLike) -> None:
        """Open the file.

        Args:
            near: a directory on the disk to use; where it does not exist, its nearest parent.
            dtype: type of the values.
        """
        near = near.absolute()
        while not near.is_dir():
            near = near.parent
        self._path = near
        self._dtype = np.dtype(dtype)
        # Not in a `with`: the map keeps the file, past the end of this object.
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=near)  # noqa: SIM115

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add values of the spool's type at the end.

        Raises:
            ResourceError: the disk is full.
        """
        with full_disk_explained(self._path):
            self._file.write(np.ascontiguousarray(values, self._dtype).data)

    def finish(self) -> npt.NDArray[Any]:
        """All values, mapped read-only; nothing can be added any more.

        Raises:
            ResourceError: the disk is full.
        """
        with full_disk_explained(self._path):
            self._file.flush()
        mapped = np.memmap(self._file, self._dtype, mode="r")
        self._file.close()
        return mapped

    def close(self) -> None:
        """Give the file up; a map of it stays valid."""
        self._file.close()
