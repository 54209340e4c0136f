"""Free memory and disk of the machine, checked before work that needs them."""

import os
import resource
import shutil
import sys
from pathlib import Path, PurePosixPath

import psutil

from mlsae.base.errors import ResourceError
from mlsae.base.units import format_bytes

_GROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}
"""Controllers of a line of /proc/self/cgroup, of version 2 and 1 → folder of groups, files of their
limit and usage, and the entry of memory.stat for pages of files that are not in use."""


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping.

    Limits of the control group and of this process's address space (`ulimit -v`) count.
    """
    available = min(int(psutil.virtual_memory().available), left_in_control_groups())
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        available = min(available, max(0, most - psutil.Process().memory_info().vms))
    return available


def left_in_control_groups(own: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int:
    """Bytes that this process's control group, and each that it is in, may still take.

    Pages of files that are not in use count as free: the kernel gives them up for others.

    Args:
        own: file with the names of the process's groups.
        root: folder of all groups.
    """
    left = sys.maxsize
    for line in _lines(Path(own)):
        _, controllers, name = line.split(":", 2)
        if controllers not in _GROUPS:
            continue
        at, limit_file, usage_file, pages_key = _GROUPS[controllers]
        group = PurePosixPath(name)
        for folder in (group, *group.parents):
            limit, usage, pages = (
                _lines(Path(f"{root}{at}/{folder}/{file}"))
                for file in (limit_file, usage_file, "memory.stat")
            )
            if limit and usage and limit[0] != "max":
                counts = {key: int(count) for key, count in (line.split() for line in pages)}
                unused = counts.get(pages_key, 0)
                left = min(left, int(limit[0]) - int(usage[0]) + unused)
    return max(0, left)


def _lines(path: Path) -> list[str]:
    """Lines of a file of the kernel; none where there is no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


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
