"""Names of the ways to hold activations: an encoding, and with `-zstd` compressed chunks.

The plan keeps the two apart; a person names them at once.
"""

from dataclasses import dataclass

from mlsae.base.errors import InputError
from mlsae.store.format.compression import COMPRESSIONS
from mlsae.store.format.encoding import STORED_DTYPE, Encoding, check_encoding


@dataclass(frozen=True)
class Preset:
    """Encoding and compression behind a name; `create` takes both."""

    encoding: Encoding
    compression: str
    """none or zstd."""

    @property
    def name(self) -> str:
        """Name of the preset."""
        return self.encoding + ("" if self.compression == "none" else f"-{self.compression}")


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for compression in COMPRESSIONS
    for preset in (Preset(check_encoding(name), compression) for name in STORED_DTYPE)
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
