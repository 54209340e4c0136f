"""The errors a user meets. Everything else that is raised is a defect of this package.

MlsaeError
├── InputError (ValueError)         what was asked for cannot be: a bad value, path, plan, pairing
│   └── mlsae.store.errors.*        one class for each way a store can be wrong
├── ResourceError (RuntimeError)    the machine is too small: memory, disk, a missing device
└── InterruptedWorkError            the user stopped the work (base/interruption.py)

A message is one line: what was wrong, expected, got, where, what to do.
"""


class MlsaeError(Exception):
    """Base class of every error meant for the user; the command line prints it and exits 1."""


class InputError(MlsaeError, ValueError):
    """What was asked for cannot be done as asked."""


class ResourceError(MlsaeError, RuntimeError):
    """The machine lacks memory, disk or a device."""
