"""The activation store: one verifiable, resumable Zarr v3 group for all layers of a transformer."""

from mlsae.store.errors import (
    ActivationError,
    DamagedStoreError,
    IncompleteStoreError,
    InvalidStoreError,
    MixedProducersError,
    NotAStoreError,
    PlanMismatchError,
    RemoteError,
    SchemaVersionError,
    StoreError,
)
from mlsae.store.format.calibration import Calibration, Calibrator
from mlsae.store.format.encoding import Encoding
from mlsae.store.format.moments import GroupMoments, Moments
from mlsae.store.read.corpus import Corpus, open_corpus
from mlsae.store.read.interface import AnyStore
from mlsae.store.read.store import Store, open_store
from mlsae.store.schema import MASKED, PADDING, SCHEMA_VERSION, SPECIAL
from mlsae.store.write.create import create, resume
from mlsae.store.write.writer import Writer

__all__ = [
    "MASKED",
    "PADDING",
    "SCHEMA_VERSION",
    "SPECIAL",
    "ActivationError",
    "AnyStore",
    "Calibration",
    "Calibrator",
    "Corpus",
    "DamagedStoreError",
    "Encoding",
    "GroupMoments",
    "IncompleteStoreError",
    "InvalidStoreError",
    "MixedProducersError",
    "Moments",
    "NotAStoreError",
    "PlanMismatchError",
    "RemoteError",
    "SchemaVersionError",
    "Store",
    "StoreError",
    "Writer",
    "create",
    "open_corpus",
    "open_store",
    "resume",
]
