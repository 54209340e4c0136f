"""Words from the specification, storage_schema.md: version, object names, flags."""

import re

SCHEMA_VERSION = "1.0"

SPECIAL = 1
"""token_flags bit 0: a special or separator token."""
PADDING = 2
"""token_flags bit 1: padding."""
MASKED = 4
"""token_flags bit 2: masked by the producer."""

ALL_FLAGS = SPECIAL | PADDING | MASKED

PLAN = "plan.json"
COMPLETE = "complete.json"
COMMITS = "commits"
SETUP = f"{COMMITS}/setup.json"
SHARD_MOMENTS = "moments"
MOMENTS = "moments.safetensors"
PROVENANCE = "provenance"
ARRAY_METADATA = "zarr.json"
PARTIAL = ".partial"
ACTIVATIONS = "activations"
BLOCK_EXPONENTS = "block_exponents"
CHANNEL_MEAN = "channel_mean"
CHANNEL_SCALE = "channel_scale"
CARD = "README.md"
TOKEN_ARRAYS = {"tokens": "<u4", "documents": "<u4", "token_flags": "<u1"}
ROW_TOKEN = "row_token"
ROW_TOKEN_DTYPE = "<u8"
CRC_BYTES = 4
"""Bytes of a CRC-32C, which follows each chunk."""
IGNORED = frozenset({CARD, ".gitattributes", ".gitignore"})
"""Files beside the store's own that a reader takes no notice of: hubs put them there."""


def activation_array(site: str, layer: int) -> str:
    """Path of an activation array inside the store's group."""
    return f"{ACTIVATIONS}/{site}/{layer}"


def commit_record(shard: int) -> str:
    """Path of a shard's commit record."""
    return f"{COMMITS}/{shard:05d}.json"


def shard_moments(shard: int) -> str:
    """Path of a shard's moments."""
    return f"{SHARD_MOMENTS}/{shard:05d}.safetensors"


def is_provenance(name: str) -> bool:
    """True for the name of a run's record; anybody may have chosen the name."""
    return re.fullmatch(rf"{PROVENANCE}/[^/\0]+\.json", name) is not None


def chunk_key(shard: int, num_dimensions: int) -> str:
    """Zarr's key of a shard object: flat, one file name."""
    return ".".join(["c", str(shard)] + ["0"] * (num_dimensions - 1))
