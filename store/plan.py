"""The plan: everything that decides a store's bytes, fixed before the first shard is written."""

import hashlib
from collections.abc import Mapping
from typing import Any

from mlsae.base.files import canonical_json


def plan_id_of(plan: Mapping[str, Any]) -> str:
    """SHA-256 of the plan's canonical JSON, hex."""
    return hashlib.sha256(canonical_json(plan)).hexdigest()
