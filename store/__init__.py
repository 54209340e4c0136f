"""The activation store: one verifiable, resumable Zarr v3 group for all layers of a transformer."""

from mlsae.store.begin import create, resume
from mlsae.store.encoding import Encoding
from mlsae.store.errors import (
    ActivationError,
    DamagedStoreError,
    IncompleteStoreError,
    MixedProducersError,
    NotAStoreError,
    PlanMismatchError,
    SchemaVersionError,
    StoreError,
)
from mlsae.store.moments import GroupMoments, Moments
from mlsae.store.reader import Store, open_store
from mlsae.store.schema import MASKED, PADDING, SCHEMA_VERSION, SPECIAL
from mlsae.store.writer import Writer

__all__ = [
    "MASKED",
    "PADDING",
    "SCHEMA_VERSION",
    "SPECIAL",
    "ActivationError",
    "DamagedStoreError",
    "Encoding",
    "GroupMoments",
    "IncompleteStoreError",
    "MixedProducersError",
    "Moments",
    "NotAStoreError",
    "PlanMismatchError",
    "SchemaVersionError",
    "Store",
    "StoreError",
    "Writer",
    "create",
    "open_store",
    "resume",
]
