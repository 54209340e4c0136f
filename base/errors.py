"""Errors meant for the user. Any other exception is a defect of this package.

MlsaeError
├── InputError (ValueError)         impossible request: a bad value, path, plan, pairing
│   └── mlsae.store.errors.*        one class for each way a store can be wrong
├── ResourceError (RuntimeError)    the machine is too small: memory, disk, a missing device
└── InterruptedWorkError            the user stopped the work (base/interruption.py)

A message is one line: the fault, the expected and the given value, the place, the remedy.
"""


class MlsaeError(Exception):
    """Base class of every error meant for the user; the command line prints it and exits 1."""


class InputError(MlsaeError, ValueError):
    """The request cannot be met as it stands."""


class ResourceError(MlsaeError, RuntimeError):
    """The machine lacks memory, disk or a device."""
