"""One class for each way a store can be wrong. Each is an InputError with a one-line message."""

from mlsae.base.errors import InputError


class StoreError(InputError):
    """Base class of everything that can be wrong with a store.

    Args:
        message: description of the fault, in one line.
        rule: number of the broken rule in storage_schema.md; None for other errors.
    """

    def __init__(self, message: str, *, rule: str | None = None) -> None:
        super().__init__(message)
        self.rule = rule


class NotAStoreError(StoreError):
    """The path does not hold an activation store."""


class IncompleteStoreError(StoreError):
    """The store's producer has not finished; it can be resumed."""


class DamagedStoreError(StoreError):
    """Bytes of the store are missing or are not those that were written."""


class SchemaVersionError(StoreError):
    """The store follows a version of the specification that this package cannot read."""


class PlanMismatchError(StoreError):
    """The directory holds a store of another plan."""


class ActivationError(StoreError):
    """Values that a store cannot hold: not finite, too large for the encoding, a wrong shape."""


class MixedProducersError(StoreError):
    """Shards of a store come from different devices or versions, which nobody allowed."""


class InvalidStoreError(StoreError):
    """The store's records are whole, but break the specification."""


class RemoteError(StoreError):
    """A place elsewhere cannot be reached, or refuses a request."""


class NotFiniteError(Exception):
    """Some value of a batch is not finite; the writer finds out which and tells the user."""
