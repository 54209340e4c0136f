"""Priority among the threads of this process."""

import os
import sys
import threading

NICENESS = 10
"""Niceness of threads that yield: a tenth of a core where all are wanted, all of an idle one."""


def yield_to_others() -> None:
    """Let threads that compute go before the calling one, which reads or writes, from now on.

    Threads that share an operation all wait for the one whose core was taken. Nothing happens
    elsewhere than on Linux, where a priority is the whole process's.
    """
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    if os.getpriority(os.PRIO_PROCESS, thread) < NICENESS:
        os.setpriority(os.PRIO_PROCESS, thread, NICENESS)
