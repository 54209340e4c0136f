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


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a preset, measured on `stories260k`; docs/evidence/benchmarks.md says how."""

    num_bytes: str
    """Bytes an activation."""
    added_fvu: str
    """FVU that rounding adds."""
    read_time: str
    """CPU time to decoded float32, relative to float16."""
    use: str
    """Reason to choose the preset."""


COSTS: dict[str, Cost] = {
    name: Cost(num_bytes=num_bytes, added_fvu=added_fvu, read_time=read_time, use=use)
    for name, num_bytes, added_fvu, read_time, use in (
        ("float16", "2.00", "6e-8", "1", "magnitudes up to 65,504"),
        ("bfloat16", "2.00", "4e-6", "0.7", "any magnitude"),
        ("float32", "4.00", "0", "1", "exact for every model"),
        ("int8", "1.02", "4e-5", "1.7", "half the disk"),
        ("float16-zstd", "1.85", "6e-8", "3.1", "less to send"),
        ("bfloat16-zstd", "1.51", "4e-6", "3.5", "less to send"),
        ("float32-zstd", "3.54", "0", "5.2", "less to send"),
        ("int8-zstd", "0.96", "4e-5", "4.1", "the least to send"),
    )
}
"""Costs of all presets, which `mlsae harvest --help` and docs/harvest.md show."""


def resolve_preset(name: str) -> Preset:
    """The encoding and the compression that a name stands for.

    Raises:
        InputError: naming those that exist.
    """
    if name not in PRESETS:
        raise InputError(f"encoding {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]
