"""Names of the ways to hold activations: an encoding, and with `-zstd` compressed chunks.

The plan keeps the two apart; a person names them at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlsae.base.errors import InputError
from mlsae.store.format.encoding import STORED_DTYPE, Encoding, check_encoding


@dataclass(frozen=True)
class Preset:
    """What a name stands for; `create` takes both."""

    encoding: Encoding
    compression: str
    """none or zstd."""


PRESETS: dict[str, Preset] = {
    f"{encoding}{suffix}": Preset(check_encoding(encoding), compression)
    for compression, suffix in (("none", ""), ("zstd", "-zstd"))
    for encoding in STORED_DTYPE
}
"""Every name, those without compression first."""


def resolve_preset(name: str) -> Preset:
    """The encoding and the compression that a name stands for.

    Raises:
        InputError: naming those that exist.
    """
    if name not in PRESETS:
        raise InputError(f"encoding {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_of(plan: Mapping[str, Any]) -> str:
    """The name of what a plan holds."""
    suffix = "" if plan["compression"] is None else f"-{plan['compression']['name']}"
    return f"{plan['encoding']}{suffix}"
