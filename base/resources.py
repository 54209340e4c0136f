"""Free memory and disk of the machine, checked before work that needs them."""

import os
import resource
import shutil
from pathlib import Path

import psutil

from mlsae.base.errors import ResourceError
from mlsae.base.units import format_bytes


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping.

    Limits of the control group and of this process's address space (`ulimit -v`) count.
    """
    available = int(psutil.virtual_memory().available)
    limit, usage = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and usage.exists():
        text = limit.read_text().strip()
        if text != "max":
            available = min(available, int(text) - int(usage.read_text()))
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        available = min(available, max(0, most - psutil.Process().memory_info().vms))
    return available


def free_disk(path: Path) -> int:
    """Bytes free to this user on the file system that holds `path` or its nearest parent."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_writable(path: Path, option: str) -> None:
    """Refuse work whose result could not be written, before the work starts.

    Args:
        path: file or directory to be written; where it does not exist, its nearest parent counts.
        option: name under which the user gave the path.

    Raises:
        ResourceError: naming the directory that cannot be written.
    """
    held = path.absolute()
    while not held.exists():
        held = held.parent
    if not os.access(held, os.W_OK):
        raise ResourceError(
            f"{option} {path} cannot be written: {held} is read-only here; change its permissions "
            f"or give another directory"
        )


def require_memory(num_bytes: int, what: str, remedy: str) -> None:
    """Refuse work that needs more memory than there is.

    Raises:
        ResourceError: naming both numbers and `remedy`.
    """
    available = available_memory()
    if num_bytes > available:
        raise ResourceError(
            f"not enough memory for {what}: needs {format_bytes(num_bytes)}, "
            f"{format_bytes(available)} available; {remedy}"
        )


def require_disk(path: Path, num_bytes: int, what: str, remedy: str) -> None:
    """Refuse work that would fill the disk under `path`.

    Raises:
        ResourceError: naming both numbers and `remedy`.
    """
    free = free_disk(path)
    if num_bytes > free:
        raise ResourceError(
            f"not enough disk for {what} at {path}: needs {format_bytes(num_bytes)}, "
            f"{format_bytes(free)} free; {remedy}"
        )
