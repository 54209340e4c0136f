"""The ways an SAE directory can be wrong."""

from mlsae.base.errors import InputError


class SAEError(InputError):
    """An SAE directory cannot be read."""


class NotAnSAEError(SAEError):
    """The directory is absent or holds something else."""


class DamagedSAEError(SAEError):
    """Files of the directory are missing, or do not hold the bytes that were written."""
