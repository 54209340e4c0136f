"""Errors meant for the user. Any other exception is a defect of this package.

MlsaeError
├── InputError (ValueError)         impossible request: a bad value, path, plan, pairing
│   └── mlsae.store.errors.*        one class for each way a store can be wrong
├── ResourceError (RuntimeError)    the machine is too small: memory, disk, a missing device
└── InterruptedWorkError            the user stopped the work (base/interruption.py)

A message is one line: the fault, the expected and the given value, the place, the remedy.
"""

import re

_LOGIN = re.compile(r"(?<=://)(?!USER:PASSWORD@)[^\s/?#'\"]*@")
_LOGIN_WITH_SLASH = re.compile(
    r"(?<=://)(?!USER:PASSWORD@)[^\s/?#:@\[]+:(?!\d*(?:[/?#\s'\"),;]|$))[^\s@]*@"
)
_QUERY = re.compile(r"(\bhttps?://[^\s?#'\"]*)\?[^\s'\"),;]*[^\s'\"),;:.]", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """A text in which no URL has a user, a password or a query; all of them may let others in."""
    text = _LOGIN_WITH_SLASH.sub("", _LOGIN.sub("", text))
    return _QUERY.sub(r"\1?…", text)


class MlsaeError(Exception):
    """Base class of every error meant for the user; the command line prints it and exits 1."""

    def __str__(self) -> str:
        return without_secrets(super().__str__())


class InputError(MlsaeError, ValueError):
    """The request cannot be met as it stands."""


class ResourceError(MlsaeError, RuntimeError):
    """The machine lacks memory, disk or a device."""
