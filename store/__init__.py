"""The activation store: one verifiable, resumable Zarr v3 group for all layers of a transformer."""

from mlsae.store.begin import create, resume
from mlsae.store.calibration import Calibration, Calibrator
from mlsae.store.corpus import AnyStore, Corpus, open_corpus
from mlsae.store.encoding import Encoding
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
