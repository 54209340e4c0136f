"""Many reads of files by one call: Linux's asynchronous I/O, whose reads of cached files are not.

Reading a few rows takes the kernel ten microseconds, and Python as long again if several threads
pass its lock to and fro for every read. `io_submit` reads, one after the other, everything it is
given, with the lock released once. There is no wrapper in any C library that is sure to be there,
so the system calls are made by number. Where they are missing or forbidden there is no `Queue`.
"""

import ctypes
import platform
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsae.base.units import counted

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]

MOST_READS = 256
"""Reads of one call."""
MOST_VECTORS = 1024
"""Pieces of memory that one read may fill: UIO_MAXIOV in linux/uio.h."""
_PREAD, _PREADV = 0, 7
_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Machine → numbers of io_setup, io_destroy, io_getevents, io_submit."""
_READ = np.dtype(
    [
        ("number", "<u8"),
        ("key", "<u4"),
        ("flags", "<i4"),
        ("operation", "<u2"),
        ("priority", "<i2"),
        ("file", "<u4"),
        ("address", "<u8"),
        ("num_bytes", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("more_flags", "<u4"),
        ("event_file", "<u4"),
    ]
)
"""struct iocb of linux/aio_abi.h."""


class Queue:
    """A context of asynchronous I/O, for one thread at a time; see `open_queue`."""

    def __init__(self, call: Any, numbers: tuple[int, int, int, int]) -> None:
        setup, self._destroy, self._getevents, self._submit = numbers
        self._call = call
        self._context = ctypes.c_ulong(0)
        if call(setup, ctypes.c_long(MOST_READS), ctypes.byref(self._context)) != 0:
            raise OSError(ctypes.get_errno(), "io_setup")
        self._reads = np.zeros(MOST_READS, _READ)
        self._reads["number"] = np.arange(MOST_READS)
        self._addresses = self._reads.ctypes.data + np.arange(MOST_READS) * _READ.itemsize
        self._events = np.empty((MOST_READS, 4), np.int64)

    def __del__(self) -> None:
        if self._context.value:
            self._call(self._destroy, self._context)

    def read(
        self,
        files: Int64,
        offsets: Int64,
        memory: Array,
        first: Int64,
        num_rows: Int64,
        places: Int64 | None = None,
    ) -> Int64:
        """Read runs of rows, and wait until all are read.

        Args:
            files: (n,) descriptor of each run's file.
            offsets: (n,) first byte of each run in its file.
            memory: (m, …) rows to be filled, C-contiguous.
            first: (n,) row of `memory` for the first row of each run, or index into `places`.
            num_rows: (n,) rows of each run; at most `MOST_VECTORS` where there are `places`.
            places: (p,) rows of `memory`, of which each run fills some that follow one another
                here; None to fill those that follow one another in memory.

        Returns:
            (n,) bytes that each has read, or negative numbers where it failed.

        Raises:
            IndexError: a run would fill bytes outside the memory, which the kernel does unasked.
        """
        if not (memory.flags.c_contiguous and memory.flags.writeable):
            raise IndexError("the memory must be contiguous and writeable")
        num_places = len(memory) if places is None else len(places)
        if not ((first >= 0) & (num_rows >= 0) & (first + num_rows <= num_places)).all():
            raise IndexError(f"runs do not fit into {counted(num_places, 'place')}")
        base, row_bytes = memory.ctypes.data, memory.strides[0]
        if places is None:
            operation, addresses, sizes = _PREAD, base + first * row_bytes, num_rows * row_bytes
        else:
            if len(places) and not (places.min() >= 0 and places.max() < len(memory)):
                raise IndexError(f"places are not among the {len(memory)} of the memory")
            vectors = np.empty((len(places), 2), np.int64)
            vectors[:, 0] = places * row_bytes + base
            vectors[:, 1] = row_bytes
            operation, sizes = _PREADV, num_rows
            addresses = vectors.ctypes.data + first * vectors.strides[0]
        found = np.full(len(files), -1)
        for start in range(0, len(files), MOST_READS):
            at = slice(start, start + MOST_READS)
            count = len(found[at])
            reads = self._reads[:count]
            reads["file"], reads["offset"], reads["operation"] = files[at], offsets[at], operation
            reads["address"], reads["num_bytes"] = addresses[at], sizes[at]
            found[at] = self._submit_reads(count)
        return found

    def _submit_reads(self, count: int) -> Int64:
        """(count,) results of the first reads in the table."""
        found = np.full(count, -1)
        submitted = self._call(
            self._submit,
            self._context,
            ctypes.c_long(count),
            ctypes.c_void_p(self._addresses.ctypes.data),
        )
        done = 0
        while done < submitted:
            events = self._events[done:]
            got = self._call(
                self._getevents,
                self._context,
                ctypes.c_long(submitted - done),
                ctypes.c_long(submitted - done),
                ctypes.c_void_p(events.ctypes.data),
                None,
            )
            done += max(got, 0)
        numbers, results = self._events[:done, 0], self._events[:done, 2]
        found[numbers] = results
        return found


def open_queue() -> Queue | None:
    """A queue, or None where the system has none, forbids it, or has none left."""
    numbers = _CALLS.get(platform.machine())
    if sys.platform != "linux" or numbers is None or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    try:
        return Queue(call, numbers)
    except OSError:
        return None
